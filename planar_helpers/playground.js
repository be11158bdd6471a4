// The planar flow in one's hand: the mathematics of planar.py and targets.py, a plane to draw on, handles to drag.
//
//     f(z) = z + û tanh(wᵀz + b),     ladj = log|h² + (1 + wᵀû)(1 − h²)|,     h = tanh(wᵀz + b)
//
// One module without a library; `playground.py` shows it in Jupyter, and on a page without a kernel. A point is
// [z_1, z_2]; the parameters are w and u (K pairs) and b (K numbers), as in Python.

const LOG_E_MINUS_1 = Math.log(Math.E - 1);
const LOG_2PI = Math.log(2 * Math.PI);
const VIEW = 5; // the plane is shown on [−5, 5]²

// ---- The mathematics ----

const dot = (p, q) => p[0] * q[0] + p[1] * q[1];
const add = (p, q, factor = 1) => [p[0] + factor * q[0], p[1] + factor * q[1]];
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const logAddExp = (p, q) => Math.max(p, q) + Math.log1p(Math.exp(-Math.abs(p - q)));

// û and slack = 1 + wᵀû, as `constrain_u`; "none" leaves u as it is, and then the step may fold.
export function constrainU(w, u, constraint) {
  const s = dot(w, u);
  const scale = Math.max(Math.abs(w[0]), Math.abs(w[1]));
  if (constraint === "none" || scale < 1e-120) return { u, slack: 1 + s };
  const direction = [w[0] / scale, w[1] / scale];
  const slack = softplus(constraint === "paper" ? s : s + LOG_E_MINUS_1);
  let mMinusS = softplus(-s) - 1;
  if (constraint === "shifted")
    mMinusS = Math.log1p((s >= 0 ? 1 / Math.E : 1 - 1 / Math.E) * Math.expm1(-Math.abs(s))) + Math.max(-s, 0);
  return { u: add(u, direction, mMinusS / dot(direction, direction) / scale), slack };
}

// The steps up to "time" t, ready to use: t = 2.5 is two steps and half of the third one's û.
export function prepare({ w, u, b, constraint }, t = w.length) {
  return w.slice(0, Math.ceil(t)).map((w_k, k) => {
    const share = Math.min(1, t - k);
    const { u: uHat, slack } = constrainU(w_k, u[k], constraint);
    return { w: w_k, u: [share * uHat[0], share * uHat[1]], b: b[k], slack: 1 + share * (slack - 1) };
  });
}

const det = (h, a, slack) => h * h + slack / Math.cosh(a) ** 2;

// Where z lands, and Σ ladj; what each step met goes into `path`.
export function chain(z, steps, path = null) {
  let ladj = 0;
  for (const { w, u, b, slack } of steps) {
    const a = dot(w, z) + b;
    const h = Math.tanh(a);
    ladj += Math.log(Math.abs(det(h, a, slack)));
    path?.push({ z, h, hPrime: 1 / Math.cosh(a) ** 2, det: det(h, a, slack) });
    z = add(z, u, h);
  }
  return { z, ladj };
}

// The a with a + m tanh(a) = target between lo and hi, where the left side does not turn: Newton's method in a bracket.
function solve(m, target, lo, hi, a) {
  const rises = lo + m * Math.tanh(lo) < hi + m * Math.tanh(hi) ? 1 : -1;
  for (let i = 0; i < 100; i++) {
    const h = Math.tanh(a);
    const residual = rises * (a + m * h - target);
    if (residual <= 0) lo = a;
    if (residual >= 0) hi = a;
    let next = a - (rises * residual) / (1 + m * (1 - h * h));
    if (!(next >= lo && next <= hi)) next = (lo + hi) / 2;
    const moved = Math.abs(next - a);
    a = next;
    if (moved <= 1e-13 * Math.abs(a) + 1e-300) break;
  }
  return a;
}

// Every a with a + m tanh(a) = target: one if m ≥ −1; else one or three, one for each branch that reaches the target.
export function roots(m, target, start = m > 0 ? target / (1 + m) : target - m * Math.sign(target)) {
  if (m >= -1) return [solve(m, target, target - Math.abs(m), target + Math.abs(m), start)];
  const turn = Math.atanh(Math.sqrt(1 + 1 / m)); // 1 + m h′ = 0 at ±turn
  const top = -turn - m * Math.tanh(turn); // the left side there: top at −turn, −top at turn
  const found = [];
  if (target <= top) found.push(solve(m, target, target + m, -turn, target + m));
  if (Math.abs(target) < top) found.push(solve(m, target, -turn, turn, 0));
  if (target >= -top) found.push(solve(m, target, turn, target - m, target - m));
  return found;
}

// All z0 that the steps send to z, each with its own ladj.
export function preimages(z, steps) {
  let points = [{ z, ladj: 0 }];
  for (const { w, u, b, slack } of [...steps].reverse())
    points = points.flatMap((point) =>
      roots(slack - 1, dot(w, point.z) + b).map((a) => {
        const h = Math.tanh(a);
        return { z: add(point.z, u, -h), ladj: point.ladj + Math.log(Math.abs(det(h, a, slack))) };
      }),
    );
  return points;
}

// log q_K at any point: the sum over all preimages, of which there is one if nothing folds.
export function logDensity(z, steps, logBase) {
  return preimages(z, steps).reduce((sum, p) => logAddExp(sum, logBase(...p.z) - p.ladj), -Infinity);
}

// For the pixels: h = tanh(a) of a step that does not fold, at the targets (i/1024)², without solving for a. (They are
// closest near 0, where the a of a nearly folding step changes fast.)
const FINE = 1024;
const tables = new Map(); // by slack: a drag changes one step of many
function tableOf(slack) {
  if (tables.has(slack)) return tables.get(slack);
  const table = [];
  let [before, h0] = [0, 0];
  for (let a = 0; a < 9; a += 1 / FINE) { // beyond, h is 1 to seven digits
    const h = Math.tanh(a);
    const target = a + (slack - 1) * h;
    for (let next; (next = (table.length / FINE) ** 2) <= target; )
      table.push(h0 + (a && ((next - before) / (target - before)) * (h - h0)));
    [before, h0] = [target, h];
  }
  if (tables.size >= 64) tables.delete(tables.keys().next().value); // the oldest
  tables.set(slack, table);
  return table;
}

function lookUp(table, target) {
  const place = Math.sqrt(Math.abs(target)) * FINE;
  const i = Math.floor(place);
  return Math.sign(target) * (i + 1 < table.length ? table[i] + (place - i) * (table[i + 1] - table[i]) : 1);
}

// q_K where no step folds, from the tables: right to a part of a shade, and fast enough for moving pictures.
export function density(x, y, steps, logBase) {
  let scale = 1;
  for (let k = steps.length - 1; k >= 0; k--) {
    const { w, u, b, slack } = steps[k];
    const h = lookUp((steps[k].table ??= tableOf(slack)), w[0] * x + w[1] * y + b);
    x -= u[0] * h;
    y -= u[1] * h;
    scale *= h * h + slack * (1 - h * h);
  }
  return Math.exp(logBase(x, y)) / scale;
}

// The paper's four energies, and the log of the target on the walled square, not normalised, as targets.py.
export function energy(x, y, i) {
  const half = (distance, scale) => 0.5 * (distance / scale) ** 2;
  const either = (p, q) => -logAddExp(-p, -q);
  if (i === 1) return half(Math.hypot(x, y) - 2, 0.4) + either(half(x - 2, 0.6), half(x + 2, 0.6));
  const ridge = y - Math.sin((2 * Math.PI * x) / 4);
  if (i === 2) return half(ridge, 0.4);
  if (i === 3) return either(half(ridge, 0.35), half(ridge + 3 * Math.exp(-half(x - 1, 0.6)), 0.35));
  return either(half(ridge, 0.4), half(ridge + 3 / (1 + Math.exp(-(x - 1) / 0.3)), 0.35));
}

export function logTarget(x, y, i) {
  const wall = (c) => 0.5 * (Math.max(Math.abs(c) - 4, 0) / 0.2) ** 2;
  return -energy(x, y, i) - wall(x) - wall(y);
}

const logMass = {}; // log ∫ exp(logTarget), by the midpoint sum, as `grid.log_mass`
export function logMassOfTarget(i) {
  if (!(i in logMass)) {
    let sum = 0;
    for (let x = -6; x <= 6; x += 0.05) for (let y = -6; y <= 6; y += 0.05) sum += Math.exp(logTarget(x, y, i));
    logMass[i] = Math.log(sum * 0.05 ** 2);
  }
  return logMass[i];
}

export const BASES = {
  gaussian: (x, y) => -LOG_2PI - 0.5 * (x * x + y * y),
  square: (x, y) => (Math.abs(x) <= 2 && Math.abs(y) <= 2 ? -Math.log(16) : -Infinity),
};
for (const i of [1, 2, 3, 4]) BASES[`target ${i}`] = (x, y) => logTarget(x, y, i) - logMassOfTarget(i);

// What fitting descends, KL(q_K ‖ target) as a mean over draws z0, and its gradient by hand, from the last step back.
export function lossAndGradient(points, parameters, logBase, target) {
  const { w, u, constraint } = parameters;
  const steps = prepare(parameters);
  const d = 1e-5; // for the gradient of logTarget: central differences, right to ten digits
  const grad = { w: w.map(() => [0, 0]), u: w.map(() => [0, 0]), b: w.map(() => 0) };
  const towardsHat = w.map(() => [0, 0]);
  const towardsM = w.map(() => 0); // m = slack − 1
  let loss = logMassOfTarget(target);
  for (const point of points) {
    const path = [];
    const { z, ladj } = chain(point, steps, path);
    loss += (logBase(...point) - ladj - logTarget(...z, target)) / points.length;
    const slope = (dx, dy) => logTarget(z[0] - dx, z[1] - dy, target) - logTarget(z[0] + dx, z[1] + dy, target);
    let back = [slope(d, 0), slope(0, d)].map((difference) => difference / (2 * d) / points.length);
    for (let k = w.length - 1; k >= 0; k--) {
      const { z, h, hPrime, det } = path[k];
      const towardsA = (dot(back, steps[k].u) + (2 * (steps[k].slack - 1) * h) / det / points.length) * hPrime;
      towardsHat[k] = add(towardsHat[k], back, h);
      towardsM[k] -= hPrime / det / points.length;
      grad.w[k] = add(grad.w[k], z, towardsA);
      grad.b[k] += towardsA;
      back = add(back, w[k], towardsA);
    }
  }
  w.forEach((w_k, k) => { // through û = u + (m(s) − s) w/‖w‖², s = wᵀu
    const s = dot(w_k, u[k]);
    const free = constraint === "none";
    const slope = free ? 1 : 1 / (1 + Math.exp(-s - (constraint === "paper" ? 0 : LOG_E_MINUS_1))); // m′(s)
    const along = dot(towardsHat[k], w_k) / dot(w_k, w_k);
    const towardsS = towardsM[k] * slope + (free ? 0 : along * (slope - 1));
    const change = free ? 0 : (steps[k].slack - 1 - s) / dot(w_k, w_k);
    grad.u[k] = add(towardsHat[k], w_k, towardsS);
    grad.w[k] = add(add(add(grad.w[k], u[k], towardsS), towardsHat[k], change), w_k, -2 * change * along);
  });
  return { loss, ...grad };
}

// Adam, on a list of numbers.
function adam(rate = 0.03) {
  const [first, second] = [[], []];
  let t = 0;
  return (values, gradient) => values.map((value, i) => {
    t += i === 0;
    first[i] = 0.9 * (first[i] ?? 0) + 0.1 * gradient[i];
    second[i] = 0.999 * (second[i] ?? 0) + 0.001 * gradient[i] ** 2;
    return value - (rate * first[i]) / (1 - 0.9 ** t) / (Math.sqrt(second[i] / (1 - 0.999 ** t)) + 1e-8);
  });
}

// Numbers in (0, 1) that are the same at every visit, by Lehmer's generator, and draws from them.
export function random(seed) {
  return () => (seed = (seed * 48271) % 2147483647) / 2147483647;
}

export function draws(n, base, uniform = random(20150706)) {
  const points = [];
  while (points.length < n) {
    if (base === "gaussian") {
      points.push(polar(360 * uniform(), Math.sqrt(-2 * Math.log(uniform()))));
    } else {
      const point = [VIEW * (2 * uniform() - 1), VIEW * (2 * uniform() - 1)]; // kept in proportion to its density
      const highest = base === "square" ? 1 / 16 : 2 * Math.exp(-logMassOfTarget(+base.at(-1)));
      if (uniform() * highest < Math.exp(BASES[base](...point))) points.push(point);
    }
  }
  return points;
}

// The mass that a one-branch formula accounts for at best: that of the z0 whose term is the largest where they land.
export function massOnOneBranch(steps, logBase, n = 100) {
  let mass = 0;
  const cell = (2 * VIEW) / n;
  for (let p = 0; p < n * n; p++) {
    const z0 = [-VIEW + ((p % n) + 0.5) * cell, -VIEW + (Math.floor(p / n) + 0.5) * cell];
    const here = logBase(...z0);
    if (here < -20) continue;
    const { z, ladj } = chain(z0, steps);
    const best = Math.max(...preimages(z, steps).map((p) => logBase(...p.z) - p.ladj));
    if (here - ladj >= best - 1e-6) mass += Math.exp(here) * cell ** 2;
  }
  return mass;
}

// ---- What is shown ----

const degrees = Math.PI / 180;
const polar = (angle, length) => [length * Math.cos(angle * degrees), length * Math.sin(angle * degrees)];

// Steps from five numbers each, as `make_step` of notebook 02: angle and length of w, u along it and across it, b.
function flow(...rows) {
  const w = rows.map(([angle, length]) => polar(angle, length));
  const u = rows.map(([angle, , along, across]) => add(polar(angle, along), polar(angle + 90, across)));
  return { w, u, b: rows.map((row) => row[4]), constraint: "shifted", base: "gaussian", target: 0, t: null };
}

const EXAMPLES = {
  Spread: [() => flow([25, 2, 1.4, 0, 0]), "Points on the dashed line stay where they are. The two sides are pushed " +
    "apart, one along u, one against it. Where space is stretched, the density falls. Drag u."],
  Squeeze: [() => flow([25, 1.2, -0.7, 0, 0]), "Now u points the other way, against w: the two sides are pushed " +
    "together, and along the line the density rises."],
  Slide: [() => flow([90, 1.5, 0, 1.7, 0]), "u lies along the line: the two sides slide past each other. The shape " +
    "bends, but no area changes, so each point keeps its density."],
  Fold: [() => ({ ...flow([25, 1.5, -2.4, 0.5, 0]), constraint: "none" }), "u pushes too hard, and the plane folds: " +
    "in the red region three points land on one place. Choose “û on” below: û is u, " +
    "moved along w so far that no step can fold."],
  Chain: [() => flow([90, 2.5, 1.2, 0, 0], [0, 1, 0, 1.5, 0], [0, 2.5, 1, 0, 0.5], [60, 1.2, -0.6, 0, 0.6]), "Four " +
    "steps in a row, a flow. Each bends what the one before made. Choose a small picture below, and drag there."],
  Learn: [() => ({ ...flow(...Array(8).fill([0, 1, 0.01, 0, 0])), w: draws(8, "gaussian", random(5e6)), target: 2 }),
    "Eight steps are trained: their w, u, b move bit by bit, until the cloud fills the outline. Watch."],
};
const HELLO = "The dashed line stays; u pushes one side along, the other back. b moves the line, w turns it. Drag one.";
const VIRIDIS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128],
  [94, 201, 98], [173, 220, 48], [253, 231, 37]];
const RED = [255, 60, 60];
const COLOURS = { b: "#ffffff", w: "#8fd0ff", u: "#ffb454" };
const LABELS = {
  constraint: { shifted: "û on", paper: "û on, the paper's", none: "û off: u as it is" },
  base: Object.fromEntries(Object.keys(BASES).map((name) => [name, name])),
  target: { 0: "none", 1: "1: ring", 2: "2: wave", 3: "3: split wave", 4: "4: fork" },
};
const KEYS = ["w", "u", "b", "constraint", "base", "target", "t"];
const [W_SCALE, W_ASIDE] = [0.5, 1.2]; // w is drawn at half its length, a little aside of u
const ARROWS = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };

function paint(pixels, steps, logBase, highest) {
  const n = pixels.width;
  const folds = steps.some((step) => step.slack <= 0);
  for (let p = 0; p < n * n; p++) {
    const z = [VIEW * ((2 * (p % n) + 1) / n - 1), VIEW * (1 - (2 * Math.floor(p / n) + 1) / n)];
    const found = folds && preimages(z, steps);
    const sum = (q, p) => q + Math.exp(logBase(...p.z) - p.ladj);
    const place = 8 * Math.min(1, (found ? found.reduce(sum, 0) : density(...z, steps, logBase)) / highest);
    const low = Math.min(7, Math.floor(place));
    const red = found.length > 1 ? 0.45 : 0;
    for (let c = 0; c < 3; c++) {
      const shade = VIRIDIS[low][c] + (place - low) * (VIRIDIS[low + 1][c] - VIRIDIS[low][c]);
      pixels.data[4 * p + c] = (1 - red) * shade + red * RED[c];
    }
    pixels.data[4 * p + 3] = 255;
  }
}

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    name.startsWith("on") ? (element[name] = value) : element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const button = (text, onclick) => h("button", { type: "button", onclick }, text);
const show = (x, digits = 2) => x.toFixed(digits).replace("-", "−");
const showPoint = (z) => `(${show(z[0])}, ${show(z[1])})`;
const rounded = (x) => Math.round(x * 1e4) / 1e4;
const clip = (x, low, high) => Math.max(low, Math.min(high, x));

// The state as the part of an address after #, and back: null if it is none of ours.
const toHash = (state) => "#planar=" + btoa(JSON.stringify(KEYS.map((key) => state[key])));
export function fromHash(hash) {
  try {
    const values = JSON.parse(atob(decodeURIComponent(hash.split("#planar=")[1])));
    const state = Object.fromEntries(KEYS.map((key, i) => [key, values[i]]));
    const K = state.b.length;
    const pairs = (rows) => rows.length === K && rows.every((row) => row.length === 2 && row.every(Number.isFinite));
    const named = Object.entries(LABELS).every(([key, labels]) => state[key] in labels);
    const fine = pairs(state.w) && pairs(state.u) && [...state.b, state.t ?? 0].every(Number.isFinite);
    return fine && named && K <= 32 ? state : null;
  } catch {
    return null;
  }
}

function render({ model, el }) {
  let s = Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const view = { probe: null, example: "", playing: null, fit: null };
  const anchors = []; // where on its dashed line each step's handles sit
  const outlines = {}; // of the targets, as pictures
  let cloud = { base: "", points: [] };
  let shown = { s: null, n: 0, picture: null }; // the density, as last drawn
  let [beside, side] = [null, 128]; // the state whose numbers stand there; pixels a side while something moves
  let [moved, frame, asked, waiting] = [0, 0, 0, 0];

  const time = () => clip(s.t ?? s.b.length, 0, s.b.length);
  const active = () => Math.max(0, Math.ceil(time()) - 1);
  const highest = () => (s.base === "square" ? 0.1 : 0.16);
  const redraw = () => (asked ||= requestAnimationFrame(tick));

  function set(changes) {
    s = { ...s, ...changes };
    for (const [key, value] of Object.entries(changes)) model.set(key, value);
    waiting ||= setTimeout(() => ((waiting = 0), model.save_changes()), 60);
    moved = performance.now();
    redraw();
  }

  function setStep(k, w, u, b) {
    const put = (rows, row) => rows.map((old, i) => (i === k ? row : old));
    set({ w: put(s.w, w.map(rounded)), u: put(s.u, u.map(rounded)), b: put(s.b, rounded(b)) });
  }

  const stop = () => ((view.playing = view.fit = beside = null), redraw());

  function start() {
    view.playing = { from: time() < s.b.length ? time() : 0, since: performance.now() };
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) stop(), set({ t: null });
    redraw();
  }

  function startFit() {
    stop();
    set({ target: s.target || 2, t: null });
    view.fit = s.b.length ? { step: adam(), losses: [], uniform: random(1) } : null;
  }

  function takeExample(name) {
    stop();
    anchors.length = 0;
    view.example = name;
    set(EXAMPLES[name][0]());
    name === "Learn" ? startFit() : start();
  }

  // Where the handles sit: b on the line, u where it pushes that point, w a little aside.
  function placeOf(name, k = active()) {
    const norm2 = dot(s.w[k], s.w[k]) || 1;
    const anchor = anchors[k] ?? [0, 0];
    const b = add(anchor, s.w[k], -(dot(s.w[k], anchor) + s.b[k]) / norm2);
    if (name === "foot of w") return add(b, [-s.w[k][1], s.w[k][0]], W_ASIDE / Math.sqrt(norm2));
    return { b, u: add(b, s.u[k]), w: add(placeOf("foot of w", k), s.w[k], W_SCALE) }[name];
  }

  function drag(name, point) {
    const k = active();
    const to = point.map((c) => clip(c, -VIEW, VIEW));
    anchors[k] = name === "b" ? to : placeOf("b");
    const from = add(to, anchors[k], -1);
    if (name === "u") return setStep(k, s.w[k], from, s.b[k]);
    const length = Math.max(0.15, Math.sqrt(Math.max(0, dot(from, from) - W_ASIDE ** 2))); // of w as it is drawn
    const angle = ((Math.atan2(from[1], from[0]) - Math.atan2(W_ASIDE, length)) * 180) / Math.PI;
    const w = name === "w" ? polar(angle, length / W_SCALE) : s.w[k];
    setStep(k, w, s.u[k], -dot(w, anchors[k]));
  }

  // -- the page

  const canvas = h("canvas", { class: "planar-plane", tabindex: 0, role: "img",
    "aria-label": "The plane with the density, a grid and points. The arrow keys move a probe over it." });
  const pen = canvas.getContext("2d");
  const handles = Object.fromEntries(Object.entries(COLOURS).map(([name, colour]) => [name, h("button",
    { class: "planar-handle", "data-handle": name, type: "button", style: `background: ${colour}` }, name)]));
  const stage = h("div", { class: "planar-stage" }, canvas, ...Object.values(handles));
  const caption = h("p", { class: "planar-caption", "aria-live": "polite" });
  const probeText = h("p", { class: "planar-probe", "aria-live": "polite" });
  const barEnd = h("b");
  const strip = h("div", { class: "planar-strip", role: "group", "aria-label": "Steps" });
  const slider = h("input", { type: "range", min: 0, step: 0.01, "aria-label": "How far the steps have run",
    oninput: () => (stop(), set({ t: +slider.value })) });
  const play = button("", () => (view.playing ? stop() : start()));
  const status = h("p", { "aria-live": "polite" });
  const choose = Object.fromEntries(Object.entries(LABELS).map(([key, labels]) => [key, h("select",
    { "aria-label": key, onchange: () => take(key, choose[key].value) },
    ...Object.entries(labels).map(([value, text]) => h("option", { value }, text)))]));
  const take = (key, value) => (stop(), set({ [key]: key === "target" ? +value : value }));
  const fitButton = button("", () => (view.fit ? stop() : startFit()));
  const addStep = button("Add a step", () => {
    stop();
    const { w, u, b } = flow([(67 * s.b.length + 25) % 180, 2, 0.8, 0, 0]);
    if (s.b.length < 16) set({ w: [...s.w, ...w], u: [...s.u, ...u], b: [...s.b, ...b], t: null });
  });
  const removeStep = button("Remove this step", () => {
    stop();
    const [w, u, b] = [s.w, s.u, s.b].map((rows) => rows.filter((_, k) => k !== active()));
    anchors.splice(active(), 1);
    set({ w, u, b, t: null });
  });
  const lossText = h("p");
  const lossLine = h("canvas", { class: "planar-loss", height: 92, width: 640, hidden: "", "aria-hidden": "true" });
  const link = h("a", { title: "Copy this link: it holds what you see" }, "Link to this picture");
  const tour = Object.keys(EXAMPLES).map((name) => button(name, () => takeExample(name)));
  const row = (...children) => h("div", { class: "planar-row" }, ...children);
  const root = h("div", { class: "planar" }, row(...tour), caption, h("div", { class: "planar-body" },
    h("div", {}, stage, h("div", { class: "planar-bar" }, "density 0", h("span"), barEnd), probeText),
    h("div", { class: "planar-side" }, row(play, slider), strip, row(choose.constraint, addStep, removeStep), status,
      row(h("label", {}, "Start from", choose.base), h("label", {}, "Target", choose.target), fitButton),
      lossText, lossLine, model.address ? link : ""))); // in a notebook the address is not the playground's
  el.append(root);

  for (const [name, handle] of Object.entries(handles)) {
    handle.onpointerdown = (event) => (stop(), handle.setPointerCapture(event.pointerId), handle.focus());
    handle.onpointermove = (event) => handle.hasPointerCapture(event.pointerId) && drag(name, toPlane(event));
    handle.onkeydown = (event) => withArrows(event, (by) => drag(name, add(placeOf(name), by)));
  }
  const point = (z) => ((view.probe = z), redraw());
  canvas.onpointermove = canvas.onpointerdown = (event) => point(toPlane(event));
  canvas.onpointerleave = (event) => event.pointerType === "mouse" && point(null);
  canvas.onkeydown = (event) => withArrows(event, (by) => point(add(view.probe ?? [0, 0], by)));

  function withArrows(event, move) {
    const by = ARROWS[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation(); // a notebook would go to another cell
    stop();
    move(event.shiftKey ? by.map((c) => c / 10) : by);
  }

  function toPlane({ clientX, clientY }) {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    return [VIEW * ((2 * (clientX - left)) / width - 1), VIEW * (1 - (2 * (clientY - top)) / height)];
  }

  // -- each frame

  function tick(now) {
    asked = 0;
    if (view.playing) {
      const t = view.playing.from + Math.max(0, now - view.playing.since) / 1200;
      if (t >= s.b.length) view.playing = null;
      set({ t: t >= s.b.length ? null : t });
    }
    if (view.fit) fitForAWhile(view.fit);
    draw();
    if (canvas.clientWidth && (view.playing || view.fit || beside !== s)) redraw(); // until one has been drawn at rest
  }

  function fitForAWhile(fit) {
    const until = performance.now() + 10;
    let { w, u, b } = s;
    while (performance.now() < until && fit.losses.length < 3000) {
      const found = lossAndGradient(draws(128, s.base, fit.uniform), { ...s, w, u, b }, BASES[s.base], s.target);
      const next = fit.step([...w.flat(), ...u.flat(), ...b], [...found.w.flat(), ...found.u.flat(), ...found.b]);
      const pairs = (from) => b.map((_, k) => next.slice(from + 2 * k, from + 2 * k + 2));
      [w, u, b] = [pairs(0), pairs(2 * b.length), next.slice(4 * b.length)];
      fit.losses.push(0.98 * (fit.losses.at(-1) ?? found.loss) + 0.02 * found.loss);
    }
    set({ w, u, b });
    lossText.textContent = `${fit.losses.length} rounds; distance to the target: KL ≈ ${show(fit.losses.at(-1))} nats`;
    lossLine.hidden = false;
    const ink = lossLine.getContext("2d");
    ink.reset();
    [ink.strokeStyle, ink.lineWidth] = ["#e07b00", 4];
    const [width, height] = [640 / fit.losses.length, 80 / Math.max(...fit.losses)];
    fit.losses.forEach((loss, i) => ink.lineTo(width * i, 86 - height * Math.max(loss, 0)));
    ink.stroke();
    if (fit.losses.length >= 3000) stop();
  }

  const toScreen = (z) => [((z[0] / VIEW + 1) * canvas.width) / 2, ((1 - z[1] / VIEW) * canvas.width) / 2];

  function densityPicture(steps, n, picture = h("canvas", { width: n, height: n })) {
    const pixels = new ImageData(n, n);
    paint(pixels, steps, BASES[s.base], highest());
    picture.getContext("2d").putImageData(pixels, 0, 0);
    return picture;
  }

  function line(points, colour, width, dash = []) {
    pen.beginPath();
    for (const z of points) pen.lineTo(...toScreen(z));
    [pen.strokeStyle, pen.lineWidth] = [colour, (width * canvas.width) / canvas.clientWidth];
    pen.setLineDash(dash.map((d) => d * pen.lineWidth));
    pen.stroke();
  }
  const circle = Array.from({ length: 25 }, (_, i) => polar(15 * i, 1));
  const ring = (z, radius, width) => line(circle.map((p) => add(z, p, radius)), "white", width);

  function arrow(from, along, colour, width) {
    const to = add(from, along);
    const barb = (turn) => add(to, polar((Math.atan2(along[1], along[0]) * 180) / Math.PI + turn, 0.3));
    line([from, to], colour, width);
    if (Math.hypot(...along) > 0.1) line([barb(155), to, barb(-155)], colour, width);
  }

  function draw() {
    const size = Math.round(canvas.clientWidth * Math.min(2, devicePixelRatio || 1));
    if (!size) return;
    if (canvas.width !== size) canvas.width = canvas.height = size;
    const resting = performance.now() - moved > 200 && !view.playing && !view.fit;
    const steps = prepare(s, time());
    const n = resting ? Math.min(400, 3 * side) : side;
    if (shown.s !== s || shown.n !== n) {
      const begun = performance.now();
      shown = { s, n, picture: densityPicture(steps, n) };
      // 12 ms for the density leave room for 30 pictures a second
      if (!resting) side = Math.round(clip(side * (performance.now() - begun > 12 ? 0.9 : 1.05), 48, 192));
    }
    pen.imageSmoothingQuality = "high";
    pen.drawImage(shown.picture, 0, 0, size, size);
    if (s.target) pen.drawImage(outlineOf(s.target), 0, 0, size, size);
    for (let c = -4; c <= 4; c += 0.5) {
      const along = Array.from({ length: 81 }, (_, i) => -4 + i / 10);
      line(along.map((d) => chain([c, d], steps).z), "rgb(255 255 255 / 0.3)", 0.8);
      line(along.map((d) => chain([d, c], steps).z), "rgb(255 255 255 / 0.3)", 0.8);
    }
    if (cloud.base !== s.base) cloud = { base: s.base, points: draws(400, s.base) };
    pen.fillStyle = "rgb(255 255 255 / 0.9)";
    const wide = (2.4 * size) / canvas.clientWidth;
    for (const { z } of cloud.points.map((z0) => chain(z0, steps)))
      pen.fillRect(...toScreen(z).map((c) => c - wide / 2), wide, wide);
    showStep(steps.at(-1), active());
    showProbe(steps, view.playing || view.fit ? null : view.probe);
    if (resting ? beside !== s : frame % 6 === 0) showSide(resting);
    root.dataset.frames = ++frame; // counted by a test
  }

  function outlineOf(i) {
    if (outlines[i]) return outlines[i];
    const n = 400;
    const at = (place) => VIEW * ((2 * place) / n - 1);
    const inside = Array.from({ length: n * n }, (_, p) => logTarget(at(p % n), -at(Math.floor(p / n)), i) > -2);
    outlines[i] = h("canvas", { width: n, height: n });
    const ink = outlines[i].getContext("2d");
    ink.fillStyle = "white";
    inside.forEach((is, p) => {
      if (is !== inside[p + 1] || is !== (inside[p + n] ?? is)) ink.fillRect(p % n, Math.floor(p / n), 1.6, 1.6);
    });
    return outlines[i];
  }

  function showStep(step, k) {
    for (const [name, handle] of Object.entries(handles)) {
      handle.hidden = !step || view.playing || view.fit;
      if (handle.hidden) continue;
      const place = placeOf(name).map((c) => clip(c, 0.3 - VIEW, VIEW - 0.3));
      [handle.style.left, handle.style.top] = [`${50 + (50 * place[0]) / VIEW}%`, `${50 - (50 * place[1]) / VIEW}%`];
      const value = name === "b" ? show(s.b[k]) : showPoint(s[name][k]);
      handle.setAttribute("aria-label", `${name} of step ${k + 1}: ${value}. The arrow keys move it.`);
    }
    if (!step || view.fit) return;
    const [w, b] = [s.w[k], placeOf("b")];
    const across = [-w[1], w[0]].map((c) => (20 * c) / (Math.hypot(...w) || 1));
    line([add(b, across), add(b, across, -1)], "rgb(0 0 0 / 0.6)", 4);
    line([add(b, across), add(b, across, -1)], "white", 2, [4, 3]);
    if (view.playing) return;
    arrow(placeOf("foot of w"), w.map((c) => c * W_SCALE), COLOURS.w, 2.5);
    arrow(b, step.u.map((c) => -c), "rgb(255 180 84 / 0.55)", 2.5);
    arrow(b, step.u, COLOURS.u, 3.5); // û, drawn to scale; dotted from u to it
    line([placeOf("u"), add(b, step.u)], COLOURS.u, 2, [1, 2]);
  }

  function showProbe(steps, z) {
    probeText.textContent = "Point at the picture, or tap it: where did that point come from?";
    if (!z) return;
    const found = preimages(z, steps);
    const terms = found.map((p) => Math.exp(BASES[s.base](...p.z) - p.ladj));
    for (const { z: z0 } of found) {
      const path = [];
      chain(z0, steps, path);
      line([...path.map((at) => at.z), z], "white", 1.5, [2, 2]);
      ring(z0, 0.1, 2);
    }
    ring(z, 0.16, 3);
    const [{ z: z0, ladj }] = found;
    const sum = terms.reduce((p, q) => p + q);
    const list = terms.map((q) => show(q, 3)).join(" + ");
    probeText.textContent = found.length === 1
      ? `At ${showPoint(z)} the density is ${show(sum, 3)}. What lies there started at ${showPoint(z0)}, where it ` +
        `was ${show(Math.exp(BASES[s.base](...z0)), 3)}; areas became ${show(Math.exp(ladj))} times as large, ` +
        `ladj = ${show(ladj)}.`
      : `${found.length} points land at ${showPoint(z)}, so the density is ${list} = ${show(sum, 3)}. ` +
        `A formula that follows one of them sees ${show(Math.max(...terms), 3)} at best.`;
  }

  // What is beside the plane: the strip of steps, the numbers of the step in hand, what û does.
  function showSide(resting) {
    const [k, K] = [active(), s.b.length];
    beside = resting ? s : null;
    if (strip.children.length !== K + 1)
      strip.replaceChildren(...Array.from({ length: K + 1 }, (_, i) => h("button", { type: "button",
        onclick: () => (stop(), set({ t: i })) }, h("canvas"), i ? `step ${i}` : "start")));
    [...strip.children].forEach((item, i) => {
      item.setAttribute("aria-pressed", Math.ceil(time()) === i);
      [item.firstChild.width, item.firstChild.height] = resting ? [50, 50] : [25, 25];
      densityPicture(prepare(s, i), resting ? 50 : 25, item.firstChild);
    });
    tour.forEach((item) => item.setAttribute("aria-pressed", item.textContent === view.example));
    caption.textContent = EXAMPLES[view.example]?.[1] ?? HELLO;
    play.textContent = view.playing ? "❚❚ Pause" : "▶ Play";
    fitButton.textContent = view.fit ? "Stop" : "Fit";
    [slider.max, slider.value] = [K, time()];
    barEnd.textContent = highest();
    link.href = toHash(s);
    for (const [name, box] of Object.entries(choose)) box.value = s[name];
    const steps = prepare(s);
    status.className = steps.some((step) => step.slack <= 0) ? "planar-folds" : "";
    if (!K) return void (status.textContent = "No step: what goes in comes out.");
    const [w, u, b, before] = [showPoint(s.w[k]), showPoint(s.u[k]), show(s.b[k]), dot(s.w[k], s.u[k])];
    status.textContent = `Step ${k + 1} of ${K}: w = ${w}, u = ${u}, b = ${b}; wᵀu = ${show(before)}. ` +
      (s.constraint !== "none" ? `û makes it ${show(steps[k].slack - 1)}: above −1 no step folds.`
        : before > -1 ? "It is above −1: this step does not fold." : "It is not above −1: the plane folds.");
    if (resting && status.className) status.textContent +=
      ` Follow one branch, and you have at best ${show(100 * massOnOneBranch(steps, BASES[s.base]), 0)} % of the mass.`;
  }

  // -- changes that come from Python, or from the address

  function changed() {
    const now = Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
    if (now.w.length !== now.u.length || now.w.length !== now.b.length) return; // the rest is on its way
    s = now;
    moved = performance.now();
    redraw();
  }
  for (const key of KEYS) model.on(`change:${key}`, changed);
  const watch = new ResizeObserver(redraw);
  watch.observe(stage);
  draw();
  showSide(true);
  if (s.t === 0) start(); // it was left at the start: show what follows
  return () => {
    cancelAnimationFrame(asked);
    watch.disconnect();
    for (const key of KEYS) model.off(`change:${key}`, changed);
  };
}

export default { render };
