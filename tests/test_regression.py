"""Regression on teacher pairs: distances, the sampler of second order, passes, and going on from it with --init."""

import json
from pathlib import Path

import pytest
import torch
from background import TINY
from gaussian import ClosedFormTeacher, Gaussian
from safetensors.torch import load_file
from torch import Tensor

from onestep.objectives.regression import l2, pseudo_huber
from onestep.rng import Rng
from onestep.run import make_student
from onestep.schedule import EDM, RectifiedFlow
from onestep.teacher import load_teacher
from onestep.train import main


def test_distances_in_their_limits():
    x, y = (Rng(0, 0, 5).normal((3, 4)).double(), Rng(1, 0, 5).normal((3, 4)).double())
    error = (x - y).flatten(1)
    assert torch.allclose(l2(x, y), error.square().mean())
    assert torch.allclose(pseudo_huber(x, y, 1e-9), error.norm(dim=1).mean() / 12**0.5)
    c = 1e4  # sqrt(q + c^2) - c = q / (2 c) - ...
    assert torch.allclose(pseudo_huber(x, y, c) * 2 * c, error.square().sum(1).mean() / 12**0.5, rtol=1e-6)
    known = pseudo_huber(torch.tensor([[3.0, 4.0]]).double(), torch.zeros(1, 2).double(), 12.0)
    assert known == pytest.approx((13 - 12) / 2**0.5)


def error_of(sampler: str, steps: int) -> float:
    """|sample - exact| on N(.7, .9^2) under EDM, whose probability flow is x - m = sqrt((s^2 + sigma^2) / ...) (x_T - m)."""
    schedule = EDM(0.02, 20.0)
    teacher = ClosedFormTeacher(Gaussian(schedule))
    z = torch.tensor([[-1.5], [0.2], [1.3]], dtype=torch.float64)
    last = torch.tensor(schedule.grid(steps)[-1], dtype=torch.float64)
    shrink = ((0.9**2 + last**2) / (0.9**2 + 20.0**2)).sqrt()
    x_last = 0.7 + shrink * (20.0 * z - 0.7)
    exact = teacher.denoiser(x_last, last.expand(3), {})
    return float((teacher.sample(z, {}, None, 1.0, steps, sampler) - exact).abs().max())


def test_dpm_is_of_second_order_and_ddim_of_first():
    ratios = {sampler: error_of(sampler, 80) / error_of(sampler, 160) for sampler in ("ddim", "dpm++")}
    assert ratios["ddim"] == pytest.approx(2, abs=0.15)
    assert ratios["dpm++"] == pytest.approx(4, abs=0.5)


def test_sampling_from_the_middle_is_that_of_a_schedule_that_ends_there():
    z = torch.tensor([[-1.5], [0.2], [1.3]], dtype=torch.float64)
    whole, part = (ClosedFormTeacher(Gaussian(EDM(0.02, most))) for most in (20.0, 5.0))
    found = whole.sample(z, {}, None, 1.0, 12, "dpm++", init_rho=5.0)
    torch.testing.assert_close(found, part.sample(z, {}, None, 1.0, 12, "dpm++"), atol=1e-9, rtol=0)
    assert float((found - whole.sample(z, {}, None, 1.0, 12, "dpm++")).abs().max()) > 0.01


def test_dpm_begins_a_flow_at_pure_noise():
    """At t = 1 alpha is 0 and lambda infinite: the first steps are DDIM's, and nothing is lost."""
    teacher = ClosedFormTeacher(Gaussian(RectifiedFlow(), "flow_prediction"))
    z = torch.tensor([[-1.5], [0.2], [1.3]], dtype=torch.float64)
    assert torch.equal(teacher.sample(z, {}, None, 1.0, 2, "dpm++"), teacher.sample(z, {}, None, 1.0, 2))
    fine = teacher.sample(z, {}, None, 1.0, 2000)
    errors = [float((teacher.sample(z, {}, None, 1.0, 20, each) - fine).abs().max()) for each in ("ddim", "dpm++")]
    assert errors[1] < errors[0] / 2


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regression") / "run"
    pairs = ["--pairs", "64", "--pair-steps", "8", "--pair-sampler", "dpm++", "--pair-batch", "16"]
    argv = ["--method", "regression", "--teacher", str(tiny_teacher), "--device", "cpu", "--iterations", "60", *pairs]
    argv += ["--batch-size", "16", "--lr", "1e-3", "--ema", "0", "--init-rho", "80", "--log-every", "1", "--grid-steps", "1"]
    assert main([*argv, "--output", str(folder)]) == 0
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export/unet/diffusion_pytorch_model.safetensors")


def test_a_student_learns_its_teachers_pairs(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(row["regression"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last < 0.7 * first


def test_another_method_goes_on_from_it(run: Path, tiny_teacher: Path, tmp_path: Path):
    argv = [*TINY, "--teacher", str(tiny_teacher), "--gan", "0", "--gan-critic", "0", "--iterations", "1", "--lr", "1e-30"]
    argv += ["--init-rho", "80", "--ema", "0"]
    for source in (run, run / "export"):
        out = tmp_path / source.name
        assert main([*argv, "--init", str(source), "--output", str(out)]) == 0
        went_on, before = weights(out), weights(run)
        assert all(torch.equal(went_on[key], before[key]) for key in before)


def test_what_cannot_be_gone_on_from(run: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [*TINY, "--teacher", str(tiny_teacher), "--gan", "0", "--gan-critic", "0", "--output", str(tmp_path / "out")]
    for source, words in ((tmp_path / "nothing", "no run and no diffusers folder"), (Path("onestep/assets/digits"), "fit")):
        with pytest.raises(SystemExit) as caught:
            main([*argv, "--init", str(source)])
        assert caught.value.code == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_passes_of_a_step(run: Path, tiny_teacher: Path):
    """One forward of the student with its backward; none of the teacher, once the pairs are there."""
    from onestep.config import resolve
    from onestep.objectives.regression import Regression

    teacher = load_teacher(str(tiny_teacher))
    recipe = {"teacher": str(tiny_teacher), "init_rho": 80.0, "pairs": 16, "pair_steps": 2}
    config, options = resolve(Regression.Config, {}, recipe, {})
    generator = make_student(config, options, teacher)
    objective = Regression(options, teacher, generator, 1.0, run / "passes", run)
    counts = {"teacher": 0, "student": 0}
    for name, network in (("teacher", teacher.denoiser.network), ("student", generator.denoiser.network)):
        network.register_forward_hook(lambda *args, name=name: counts.update({name: counts[name] + 1}))
    from onestep.objectives import Batch

    list(objective.step(Batch(torch.zeros(4, dtype=torch.long), None, Rng(0, 0, 4)), 0))
    assert counts == {"teacher": 0, "student": 1}
