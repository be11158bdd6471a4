"""The model: shapes, the batch against images one by one, what it refuses, and that the flow stays out of p."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, TransformedDistribution

from planar_helpers.elbo import bernoulli_log_likelihood
from planar_helpers.planar import PlanarTransform, planar_chain
from planar_helpers.quadrature import exact_log_px
from planar_helpers.vae import FlowPosterior, PlanarVAE, evaluating


def test_defaults_are_the_posts() -> None:
    model = PlanarVAE()
    shapes = sorted(tuple(p.shape) for p in model.parameters() if p.dim() == 2)
    assert shapes == sorted([(500, 784), (2 + 2 + 6 + 6 + 3, 500), (500, 2), (784, 500)])
    assert model.K == 3 and model.D == 2


@pytest.mark.parametrize("D", [1, 2, 5])
@pytest.mark.parametrize("K", [0, 1, 4])
@pytest.mark.parametrize("B", [0, 1, 6])
def test_shapes(D: int, K: int, B: int) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, D=D, K=K), torch.rand(B, 12)
    mu, logvar, w, u, b = model.encode(x).tensors
    assert mu.shape == logvar.shape == (B, D) and w.shape == u.shape == (B, K, D) and b.shape == (B, K)
    assert all(term.shape == (B,) for term in model(x))
    zK, log_q0, sum_ladj = model.encode(x).rsample((7,))
    assert zK.shape == (7, B, D) and log_q0.shape == sum_ladj.shape == (7, B)
    assert model.decode(zK).shape == (7, B, 12)
    assert model.reconstruct(x).shape == (B, 12) and model.sample(3).shape == (3, 12)


def test_a_batch_equals_its_images_one_by_one() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8).double(), torch.rand(6, 12).double()
    whole = model.encode(x)
    for i in range(6):
        for field, one in zip(whole.tensors, model.encode(x[i : i + 1]).tensors, strict=True):
            assert torch.allclose(field[i], one[0], atol=1e-12)
    z0 = torch.randn(6, 2).double()
    zK, sum_ladj = planar_chain(z0, *whole.tensors[2:])
    for i in range(6):
        z_i, ladj_i = planar_chain(z0[i], *(field[i] for field in whole.tensors[2:]))
        assert torch.allclose(zK[i], z_i) and torch.allclose(sum_ladj[i], ladj_i)


@pytest.mark.parametrize("constraint", ["paper", "shifted"])
def test_posterior_against_torch_distributions(constraint: str) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, constraint=constraint).double(), torch.rand(6, 12).double()
    posterior = model.encode(x)
    mu, logvar, w, u, b = posterior.tensors
    q0 = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
    qK = TransformedDistribution(q0, PlanarTransform(w, u, b, constraint))
    zK, log_q0, sum_ladj = posterior.rsample((4,))
    assert torch.allclose(log_q0 - sum_ladj, qK.log_prob(zK), atol=1e-8)
    z = torch.randn(9, 6, 2).double()  # points it never sampled
    assert torch.allclose(posterior.log_prob(z), qK.log_prob(z), atol=1e-8)


@pytest.mark.parametrize("constraint", ["paper", "shifted"])
def test_nothing_that_rebuilds_a_posterior_loses_its_constraint(constraint: str) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, constraint=constraint), torch.rand(6, 12)
    posterior = model.encode(x)
    detached = posterior.detach()
    rebuilt = {
        "map": posterior.map(lambda tensor: 2 * tensor),
        "replace": posterior.replace(mu=posterior.mu + 1),
        "dataclasses.replace": dataclasses.replace(posterior, mu=posterior.mu + 1),
        "double": posterior.double(),
        "image": posterior.image(3),
        "without_steps": posterior.without_steps(),
        "vmap": torch.func.vmap(model.encode)(x.unsqueeze(1)),
        "tree_map": torch.utils._pytree.tree_map(lambda leaf: leaf + 1, posterior),
        "deepcopy": copy.deepcopy(detached),
        "pickle": pickle.loads(pickle.dumps(detached)),
    }
    for name, other in rebuilt.items():
        assert other.constraint == constraint, name
        assert repr(constraint) in repr(other) and "\n" not in repr(other), name
    assert rebuilt["deepcopy"] == rebuilt["pickle"] == posterior
    with pytest.raises(TypeError, match="constraint"):
        FlowPosterior(*posterior.tensors)
    with pytest.raises(TypeError, match="must be an iterable"):
        FlowPosterior(*posterior)
    with pytest.raises(ValueError, match="constraint must be one of"):
        posterior.replace(constraint="papre")
    with pytest.raises(dataclasses.FrozenInstanceError):
        posterior.constraint = "shifted"


def test_posteriors_are_equal_if_all_values_and_the_constraint_are() -> None:
    posterior = PlanarVAE(d_x=12, hidden=8).encode(torch.rand(6, 12))
    assert posterior == posterior.map(torch.clone)
    for field in ("mu", "logvar", "w", "u", "b"):
        assert posterior != posterior.replace(**{field: getattr(posterior, field) + 1})
    assert posterior != posterior.replace(constraint="paper") and posterior != "posterior"


def test_one_image_and_no_steps_are_what_they_say() -> None:
    posterior = PlanarVAE(d_x=12, hidden=8).double().encode(torch.rand(6, 12).double())
    z = torch.randn(9, 6, 2).double()
    assert torch.allclose(posterior.image(4).log_prob(z[:, 4:5]), posterior.log_prob(z)[:, 4:5], atol=1e-12)
    assert torch.equal(posterior.image(-1).mu, posterior.mu[5:])
    with pytest.raises(IndexError):
        posterior.image(6)
    q0 = Independent(Normal(posterior.mu, torch.exp(0.5 * posterior.logvar)), 1)
    assert torch.allclose(posterior.without_steps().log_prob(z), q0.log_prob(z), atol=1e-12)
    assert posterior.map(torch.Tensor.float).double().w.dtype == torch.float64
    assert posterior.w.requires_grad and not posterior.detach().w.requires_grad


@pytest.mark.parametrize("constraint", ["paper", "shifted"])
def test_weights_of_another_constraint_do_not_load(constraint: str) -> None:
    model, other = (
        PlanarVAE(d_x=12, hidden=8, constraint=constraint),
        PlanarVAE(d_x=12, hidden=8, constraint="paper" if constraint == "shifted" else "shifted"),
    )
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, x = PlanarVAE(d_x=12, hidden=8, constraint=constraint), torch.rand(5, 12)
    again.load_state_dict(state)
    assert torch.equal(model.reconstruct(x), again.reconstruct(x))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=f"weights are of constraint '{constraint}'"):
        other.load_state_dict(state)
    del state["_extra_state"]
    for strict in (True, False):
        with pytest.raises(ValueError, match="weights are of constraint 'unknown'"):
            other.load_state_dict(state, strict=strict)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert f"constraint={constraint!r}" in repr(model)


# log p(x, z) and draws of the ELBO ----------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [0, 1, 6])
def test_log_joint_against_torch_distributions_at_own_and_at_shared_points(B: int) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8).double(), torch.rand(B, 12).round().double()
    for z in (torch.randn(4, 7, B, 2).double(), torch.randn(4, 7, 1, 2).double(), torch.randn(B, 2).double()):
        pixels = Bernoulli(logits=model.decode(z)).log_prob(x).sum(-1)
        assert torch.allclose(model.log_joint(x, z), pixels + Normal(0.0, 1.0).log_prob(z).sum(-1), atol=1e-10)
        assert model.log_joint(x, z).shape == (*z.shape[:-2], B)


def test_shared_points_are_decoded_once_and_never_expanded() -> None:
    model, rows = PlanarVAE(d_x=12, hidden=8), []
    model.decoder.register_forward_hook(lambda module, inputs, output: rows.append(output.numel()))
    with torch.no_grad(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        model.log_joint(torch.rand(50, 12), torch.randn(30, 1, 2))
    assert rows == [30 * 12]
    assert max(event.cpu_memory_usage for event in profile.function_events) < 4 * 50 * 30 * 12


def test_draws_of_the_elbo_are_those_of_forward_and_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(6, 12)
    posterior = model.encode(x)
    torch.manual_seed(3)
    draws = model.elbo_draws(x, posterior, 1)
    torch.manual_seed(3)
    assert draws.shape == (1, 6) and torch.allclose(draws[0], model(x).elbo, atol=1e-5)
    sizes = []
    monkeypatch.setattr("planar_helpers.vae.ROWS_AT_ONCE", 24)  # four draws of six images
    model.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    draws = model.elbo_draws(x, posterior, 10)
    assert draws.shape == (10, 6) and sizes == [24, 24, 12] and draws.flatten().unique().numel() == 60
    assert model.elbo_draws(x[:0], model.encode(x[:0]), 10).shape == (10, 0)


def test_draws_of_the_elbo_under_any_posterior_have_its_mean_and_gradient() -> None:
    model, x = PlanarVAE(d_x=5, hidden=4, K=0).double(), torch.rand(3, 5).double()
    with torch.no_grad():
        model.decoder[2].weight.zero_()  # the decoder ignores z: ELBO = log p(x) − KL(q ‖ prior)
    mu, logvar = torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 2).double()
    empty = torch.zeros(3, 0, 2).double()
    q = FlowPosterior(mu, logvar, empty, empty, empty[..., 0], "shifted")
    draws = model.elbo_draws(x, q, 20_000)
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)
    exact = bernoulli_log_likelihood(x, model.decoder[2].bias) - kl
    assert ((draws.mean(0) - exact).abs() < 4.5 * draws.std(0) / 20_000**0.5).all()
    (slope,) = torch.autograd.grad(draws.mean(0).sum(), mu)
    assert torch.allclose(slope, -mu, atol=0.1)
    one_for_all = FlowPosterior(mu[:1], logvar[:1], empty[:1], empty[:1], empty[:1, :, 0], "shifted")
    assert model.elbo_draws(x, one_for_all, 7).shape == (7, 3)


def test_bad_points_and_posteriors_get_a_clear_error() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(6, 12)
    for bad in (torch.zeros(6), torch.zeros(4, 5, 2), [[0.0, 0.0]]):
        with pytest.raises(ValueError, match="z must have shape"):
            model.log_joint(x, bad)
    with pytest.raises(TypeError, match="z must be a tensor of the model's dtype"):
        model.log_joint(x, torch.zeros(6, 2).double())
    with pytest.raises(ValueError, match="n must be"):
        model.elbo_draws(x, model.encode(x), 0)
    with pytest.raises(ValueError, match="posterior must be of 6 images"):
        model.elbo_draws(x, model.encode(x[:2]), 3)
    for call in (
        lambda: model.log_joint(x + 1, torch.zeros(6, 2)),
        lambda: model.elbo_draws(x + 1, model.encode(x), 3),
    ):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call()


# surroundings -------------------------------------------------------------------------------------------------------


def with_dropout_and_batch_norm() -> PlanarVAE:
    model = PlanarVAE(d_x=12, hidden=8)
    model.encoder.append(torch.nn.BatchNorm1d(8))
    model.decoder.insert(1, torch.nn.Dropout(0.5))
    model.decoder.insert(1, torch.nn.BatchNorm1d(8))
    return model


def test_layers_that_a_reader_adds_see_one_row_a_point() -> None:
    model, x = with_dropout_and_batch_norm().eval(), torch.rand(8, 12)  # as many images as hidden units
    torch.nn.init.normal_(model.decoder[1].weight)
    z = torch.randn(5, 8, 2)
    for i in range(5):
        assert torch.allclose(model.decode(z)[i], model.decoder(z[i]), atol=1e-6)
        assert torch.allclose(model.log_joint(x, z)[i], model.log_joint(x, z[i]), atol=1e-4)
    assert torch.allclose(model.log_joint(x, z[:, :1])[3, 2], model.log_joint(x, z[3, :1].expand(8, 2))[2], atol=1e-4)
    model.heads = torch.nn.Sequential(torch.nn.Dropout(0.1), model.heads)
    assert model.reconstruct(x).shape == (8, 12) and model.sample(2).shape == (2, 12) and model(x).elbo.shape == (8,)


def test_evaluating_leaves_every_part_in_the_mode_it_was_in() -> None:
    model = with_dropout_and_batch_norm()
    model.decoder.eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert model.training and model.encoder.training and not model.decoder.training and not model.decoder[2].training


def test_pictures_do_not_depend_on_the_mode() -> None:
    model, x = with_dropout_and_batch_norm(), torch.rand(6, 12)
    averages = model.encoder[2].running_mean.clone()
    assert torch.equal(model.train().reconstruct(x), model.reconstruct(x))
    torch.manual_seed(0)
    trained = model.sample(5)
    torch.manual_seed(0)
    assert torch.equal(trained, model.eval().sample(5))
    assert torch.equal(averages, model.encoder[2].running_mean)


def test_autocast_has_no_say() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(6, 12)
    z = torch.randn(4, 6, 2)
    calls = {
        "encode": lambda: model.encode(x).u,
        "decode": lambda: model.decode(z),
        "forward": lambda: model(x).elbo,
        "elbo_terms": lambda: model.elbo_terms(x).elbo,
        "log_joint": lambda: model.log_joint(x, z),
        "log_joint, shared": lambda: model.log_joint(x, z[:, :1]),
        "elbo_draws": lambda: model.elbo_draws(x, model.encode(x), 3),
        "sample": lambda: model.sample(3),
        "reconstruct": lambda: model.reconstruct(x),
    }
    for name, call in calls.items():
        torch.manual_seed(0)
        plain = call()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(), plain), name


def test_half_precision_is_refused() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = PlanarVAE(d_x=12, hidden=8).to(dtype)
        for call in (model.encode, model.forward, model.reconstruct):
            with pytest.raises(TypeError, match="must be float32 or float64"):
                call(torch.rand(3, 12).to(dtype))


def test_transforms_compile_and_export_are_not_blocked_by_the_look_at_the_pixels() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(6, 12)
    each = torch.func.vmap(lambda one: model.encode(one.unsqueeze(0)).mu.squeeze(0))(x)
    assert torch.allclose(each, model.encode(x).mu, atol=1e-6)
    rows = torch.func.jacrev(lambda one: model.encode(one.unsqueeze(0)).mu.squeeze(0))(x[0])
    assert rows.shape == (2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    expected = model(x).elbo
    torch.manual_seed(1)
    assert torch.allclose(compiled(x).elbo, expected, atol=1e-6)
    program = torch.export.export(model, (x,))
    torch.manual_seed(1)
    assert torch.allclose(program.module()(x).elbo, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):  # outside of them the look is taken
        model(x + 1)
    any_batch = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=64)},))
    torch.manual_seed(1)
    expected = model(torch.cat([x, x])).elbo
    torch.manual_seed(1)
    assert torch.allclose(any_batch.module()(torch.cat([x, x])).elbo, expected, atol=1e-6)


def test_forward_draws_z0_in_eval_too_and_its_terms_are_those_of_its_draw() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8).eval(), torch.rand(6, 12)
    assert not torch.equal(model(x).log_q0, model(x).log_q0)
    torch.manual_seed(3)
    terms = model(x)
    torch.manual_seed(3)
    zK, log_q0, sum_ladj = model.encode(x).rsample()
    prior = Independent(Normal(torch.zeros(2), 1.0), 1)
    assert torch.allclose(terms.log_px_z, bernoulli_log_likelihood(x, model.decode(zK)))
    assert torch.allclose(terms.log_pz, prior.log_prob(zK))  # at zK, not at z0
    assert torch.equal(terms.log_q0, log_q0) and torch.equal(terms.sum_ladj, sum_ladj)


def test_gradients_reach_every_parameter() -> None:
    model = PlanarVAE(d_x=12, hidden=8)
    model(torch.rand(50, 12)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert (model.heads.weight.grad.abs().sum(1) > 0).all()  # each row: μ, log σ², w, u, b


def test_generation_decodes_the_prior_and_knows_no_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PlanarVAE(d_x=12, hidden=8)
    monkeypatch.setattr("planar_helpers.vae.planar_chain", lambda *_: pytest.fail("the flow was used to generate"))
    torch.manual_seed(5)
    images = model.sample(4)
    torch.manual_seed(5)
    assert torch.equal(images, torch.sigmoid(model.decode(torch.randn(4, 2))))


def test_a_reconstruction_is_repeatable_and_pushed_through_the_flow() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(6, 12)
    mu, _, w, u, b = model.encode(x).tensors
    expected = torch.sigmoid(model.decode(planar_chain(mu, w, u, b, "shifted")[0]))
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    assert torch.allclose(model.reconstruct(x), expected)


def test_the_elbo_is_below_exact_log_px(trained: PlanarVAE, digits) -> None:
    """The mean of many draws, with its standard error, for every model the tests train."""
    x = digits.test[:16].float() / 255
    with torch.no_grad():
        draws = torch.stack([trained(x).elbo for _ in range(400)])
    log_px, error = exact_log_px(trained, x)
    standard_error = draws.std(0) / 20
    assert (draws.mean(0) <= log_px + error + 4 * standard_error).all()
    assert (log_px - draws.mean(0)).mean() > 0.05  # and not by being equal


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(3, 11), ValueError, r"x must have shape \(B, 12\)"),
        (torch.rand(12), ValueError, "x must have shape"),
        (torch.rand(3, 1, 12), ValueError, "x must have shape"),
        (torch.rand(3, 12).double(), TypeError, "dtype"),
        (torch.ones(3, 12, dtype=torch.uint8), TypeError, "to_float"),
        ([[0.0] * 12], TypeError, "x must be a floating tensor"),
        (torch.full((3, 12), 1.5), ValueError, r"\[0, 1\]"),
        (torch.full((3, 12), -0.01), ValueError, r"\[0, 1\]"),
        (torch.full((3, 12), torch.nan), ValueError, "NaN"),
    ],
)
def test_bad_images_get_a_clear_error(x, error: type, message: str) -> None:
    model = PlanarVAE(d_x=12, hidden=8)
    for call in (model.encode, model.forward, model.reconstruct):
        with pytest.raises(error, match=message):
            call(x)


def test_bad_sizes_get_a_clear_error() -> None:
    for settings in (
        {"K": -1},
        {"D": 0},
        {"D": 2.5},
        {"hidden": 0},
        {"hidden": 2.5},
        {"d_x": 0},
        {"d_x": True},
        {"constraint": "no"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PlanarVAE(**settings)
    model = PlanarVAE(d_x=12, hidden=8)
    with pytest.raises(ValueError, match="z must have shape"):
        model.decode(torch.zeros(4, 3))
    for bad in (-1, 2.0, True):
        with pytest.raises(ValueError, match="n must be"):
            model.sample(bad)
    for bad in (torch.zeros(4, 2).double(), [[0.0, 0.0]]):
        with pytest.raises(TypeError, match="z must be a tensor"):
            model.decode(bad)


def test_a_slice_is_no_image_and_a_tuple_no_posterior() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(6, 12)
    for wrong in (slice(0, 2), None):
        with pytest.raises(TypeError):
            model.encode(x).image(wrong)
    with pytest.raises(ValueError, match="posterior must be of 6 images"):
        model.elbo_draws(x, model.encode(x).tensors, 3)


def test_the_gradient_of_a_reconstruction_is_not_lost() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8).double(), torch.rand(1, 12).double()
    assert torch.autograd.gradcheck(model.reconstruct, x.clamp(0.1, 0.9).requires_grad_())


# --- the families that are controls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1, 2, 5])
def test_a_full_covariance_is_torchs_own(D: int) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, D=D, K=0, family="gaussian").double(), torch.rand(4, 12).double()
    posterior = model.encode(x)
    lower = torch.eye(D).double().repeat(4, 1, 1)
    rows, columns = torch.tril_indices(D, D, -1)
    if D > 1:
        lower[:, rows, columns] = posterior.shear
    truth = torch.distributions.MultivariateNormal(
        posterior.mu, scale_tril=lower @ torch.diag_embed(torch.exp(0.5 * posterior.logvar))
    )
    zK, log_q0, sum_ladj = posterior.rsample((20_000,))
    assert torch.allclose(log_q0 - sum_ladj, truth.log_prob(zK)) and torch.allclose(
        posterior.log_prob(zK[:5]), truth.log_prob(zK[:5])
    )
    for i in range(4):
        assert torch.allclose(torch.cov(zK[:, i].T).reshape(D, D), truth.covariance_matrix[i], rtol=0.1, atol=0.06)
    assert posterior.map(torch.clone) == posterior == posterior.replace() and posterior.without_steps() == posterior
    assert posterior.image(-1).shear.shape == (1, D * (D - 1) // 2)
    if D > 1:
        assert posterior.replace(shear=None) != posterior
        bound = model(x)
        (slope,) = torch.autograd.grad(bound.loss, model.heads.bias)
        assert slope[2 * D :].abs().min() > 0, "the shear is not trained"


@pytest.mark.parametrize("D", [1, 2, 5])
def test_a_translation_is_planar_steps_with_w_zero(D: int) -> None:
    torch.manual_seed(3)
    model, x = PlanarVAE(d_x=12, hidden=8, D=D, K=4, family="translation"), torch.rand(6, 12)
    torch.manual_seed(3)
    planar = PlanarVAE(d_x=12, hidden=8, D=D, K=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), planar.parameters(), strict=True))
    flowing = planar.encode(x)
    still = flowing.replace(w=torch.zeros_like(flowing.w))
    torch.manual_seed(5)
    by_steps = still.rsample((7,))
    torch.manual_seed(5)
    at_once = model.encode(x).rsample((7,))
    for one, other in zip(by_steps, at_once, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not at_once[2].any() and model.encode(x).w.shape == (6, 0, D)
    assert not torch.allclose(model.encode(x).mu, flowing.mu, atol=1e-3)


def test_several_hidden_layers_and_dropout() -> None:
    model, x = PlanarVAE(d_x=12, hidden=(9, 7), D=2, K=1, dropout=0.5), torch.rand(500, 12)
    assert [layer.out_features for layer in model.encoder if hasattr(layer, "out_features")] == [9, 7]
    assert [layer.out_features for layer in model.decoder if hasattr(layer, "out_features")] == [7, 9, 12]
    assert model.settings["hidden"] == (9, 7) and "dropout=0.5" in repr(model)
    assert model.encode(x) != model.encode(x), "in train() pixels are dropped"
    model.eval()
    assert model.encode(x) == model.encode(x)
    torch.manual_seed(0)
    one = PlanarVAE(hidden=(500,))
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), PlanarVAE().parameters(), strict=True))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"family": "iaf"}, "family must be one of"), ({"family": "gaussian"}, "with K = 0"),
        ({"dropout": 1.0}, "dropout must"), ({"dropout": -0.1}, "dropout must"), ({"dropout": "a"}, "dropout must"),
        ({"dropout": float("nan")}, "dropout must be"), ({"hidden": ()}, "hidden layers must be"),
        ({"hidden": (5, 0)}, "hidden must"), ({"hidden": (5.0,)}, "hidden must"), ({"hidden": "500"}, "hidden must"),
    ],
)  # fmt: skip
def test_bad_families_layers_and_dropout_get_a_clear_error(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanarVAE(**bad)
