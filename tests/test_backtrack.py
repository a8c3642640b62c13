"""Distribution backtracking: the recorded way in closed form, its use in reverse, files, resuming, memory."""

import shutil
from pathlib import Path
from typing import Any

import playing
import pytest
import torch
from background import TINY
from gaussian import TYPES, Affine, ClosedFormTeacher, GridRng, fixed_level, grid
from playing import MU, TAU, M, S, batch, dit, play, zeros
from safetensors.torch import load_file
from tiny import edm_pipeline
from torch import Tensor

from onestep.config import resolve
from onestep.denoiser import unwrap
from onestep.objectives import disback, dmd2, objective_class
from onestep.objectives.backtrack import Backtrack
from onestep.objectives.base import Batch
from onestep.objectives.disback import DisBack
from onestep.objectives.dmd2 import DMD2
from onestep.objectives.f_distill import FDistill
from onestep.objectives.score import ScoreDistillation
from onestep.plan_memory import Run
from onestep.plan_teacher import Blank
from onestep.run import make_trainer
from onestep.teacher import EDMTeacher, Facts
from onestep.train import main
from onestep.trainer import Trainer

ALPHA, SIGMA, ETA, EVERY = 0.8, 0.6, 0.05, 20
NODES = ((M, S), (-0.25529396, 0.75295287), (-0.36615790, 0.65677093), (-0.38915295, 0.62063884))
"""(mean, std) after 0, 20, 40 and 60 steps; the last is where the critic starts."""
METHODS = {
    "dmd2": (DMD2, {"gan": 0.0, "gan_critic": 0.0, "ratio": 1}),
    "disback": (DisBack, {}),
}


def posterior(mean: float, std: float) -> tuple[float, float]:
    """(gain, bias) of the denoiser of N(mean, std^2) at the one noise level."""
    gain = ALPHA * std**2 / (ALPHA**2 * std**2 + SIGMA**2)
    return gain, mean * (1 - ALPHA * gain)


def law(gain: float, bias: float) -> tuple[float, float]:
    """(mean, std) of the Gaussian that an affine denoiser belongs to."""
    return bias / (1 - ALPHA * gain), (gain * SIGMA**2 / (ALPHA * (1 - ALPHA * gain))) ** 0.5


def put(network: Any, gain: float, bias: float) -> None:
    with torch.no_grad():
        network.gain.fill_(gain)
        network.bias.fill_(bias)


def affine(kind: str, run: Path, method: str = "dmd2", steps: int = 7) -> ScoreDistillation:
    """Affine networks at one noise level: a teacher of N(M, S^2) and the student MU + TAU z; 60 steps, 3 nodes."""
    schedule, _, _ = fixed_level("vp")
    network = Affine(schedule, kind)
    put(network, *posterior(M, S))
    cls, options = METHODS[method]
    recording = {"backtrack": 3 * EVERY, "backtrack_nodes": 3, "backtrack_steps": steps}
    made = playing.objective(cls, ClosedFormTeacher(network), run, times=[0], **recording, **options)
    put(made.generator.denoiser.network, TAU, MU)  # of the noise z itself
    return made


def item() -> Batch:
    """Denoising is quadratic in the draws: two points for each of them give its expectation."""
    (z, eps), _ = grid(2, 2)
    return Batch(zeros(len(z)), None, GridRng([z, eps, eps]))


def descend(network: Any, lr: float) -> None:
    """Plain gradient descent."""
    with torch.no_grad():
        for p in (network.gain, network.bias):
            p -= lr * p.grad
            p.grad = None


def weight_of(kind: str) -> float:
    """The weight that denoising in this prediction gives to the error in x0."""
    edm = (SIGMA**2 + 0.25) / (0.25 * SIGMA**2)
    snr = (ALPHA / SIGMA) ** 2
    return {"v_prediction": 1 / SIGMA**2, "flow_prediction": ((ALPHA + SIGMA) / SIGMA) ** 2, "edm": edm}.get(kind, snr)


def recorded(kind: str, run: Path, method: str = "dmd2") -> ScoreDistillation:
    made = affine(kind, run, method)
    for step in range(3 * EVERY):
        assert play(made, step, item()) == ["critic"]
        descend(made.fake.network, ETA / weight_of(kind))
    return made


# --- the recorded way


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_nodes_are_those_of_gradient_descent_on_a_quadratic(kind: str, method: str, tmp_path: Path) -> None:
    """p_k = p* + (1 - eta H)^k (p_teacher - p*), H = 2 [[P + (alpha mu)^2, alpha mu], [alpha mu, 1]]."""
    made = recorded(kind, tmp_path, method)
    p = ALPHA**2 * TAU**2 + SIGMA**2
    hessian = 2 * torch.tensor([[p + (ALPHA * MU) ** 2, ALPHA * MU], [ALPHA * MU, 1.0]], dtype=torch.float64)
    best, start = (torch.tensor(posterior(*each), dtype=torch.float64) for each in ((MU, TAU), (M, S)))
    files = [load_file(tmp_path / f"backtrack/node-00{i}.safetensors") for i in (1, 2)]
    for k, found in zip((20, 40, 60), [*files, made.fake.network.state_dict()]):
        exact = best + torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) - ETA * hessian, k) @ (start - best)
        got = torch.stack([found["gain"], found["bias"]])
        torch.testing.assert_close(got, exact, atol=1e-14, rtol=0)
        assert law(*got.tolist()) == pytest.approx(NODES[k // EVERY], abs=1e-8)
    assert len(list((tmp_path / "backtrack").iterdir())) == 2  # the teacher and the critic's start are no files
    assert law(*(float(v) for v in made.teacher.denoiser.network.state_dict().values())) == pytest.approx((M, S), abs=1e-12)


def test_recording_leaves_the_generator_alone(tmp_path: Path) -> None:
    made = affine("epsilon", tmp_path)
    before = [p.clone() for p in made.generator.parameters()]
    play(made, 0, item())
    assert not any(playing.has_gradient(made.generator)) and all(playing.has_gradient(made.fake))
    assert all(torch.equal(a, b) for a, b in zip(before, made.generator.parameters()))


# --- the way back


@pytest.mark.parametrize("record, nodes, steps", [(10, 4, 3), (7, 7, 1), (5, 1, 9), (1, 1, 1), (100, 3, 1)])
def test_targets_descend_to_the_teacher_and_stay_there(record: int, nodes: int, steps: int, tmp_path: Path) -> None:
    path = Backtrack(tmp_path, dit(), record, nodes, steps)
    indices = [path.index(step) for step in range(record, path.settled + 20)]
    assert indices == [node for node in range(nodes - 1, 0, -1) for _ in range(steps)] + [0] * 20
    assert path.settled == record + (nodes - 1) * steps
    assert all(path.recording(step) and not path.index(step) for step in range(record))
    assert len(path.kept()) == (nodes > 1)  # without nodes there is nothing to keep


def test_off_is_off(tmp_path: Path) -> None:
    path = Backtrack(tmp_path, dit(), 0, 4, 100)
    assert (path.settled, path.kept(), path.recording(0), path.index(0)) == (0, [], False, 0)
    path.visit(0, dit().copy())
    assert path.node is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [DisBack, FDistill])
def test_more_nodes_than_steps_are_refused(kind: type[ScoreDistillation]) -> None:
    with pytest.raises(ValueError, match="5 is more than the 4 steps of --backtrack; type a smaller --backtrack-nodes"):
        kind.Config(backtrack=4, backtrack_nodes=5)


def test_each_target_is_the_node_and_the_last_is_the_unmodified_teacher(tmp_path: Path) -> None:
    made = recorded("epsilon", tmp_path)
    critic = [p.clone() for p in made.fake.parameters()]
    teacher = [p.clone() for p in made.teacher.denoiser.parameters()]
    x_t, t = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], zeros(5)
    cond, uncond = made.teacher.encode(zeros(5))
    seen = []
    for step in range(60, 80):
        made.path.visit(step, made.fake)
        answer = made.real(x_t, t, cond, uncond)
        slope = (answer[-1] - answer[0]) / 4
        seen.append(law(float(slope), float(answer[2])))
        if step == 60:  # where the critic begins is the end of the recorded way: nothing has been put in its place
            assert all(torch.equal(a, b) for a, b in zip(critic, made.fake.parameters()))
    for index, (mean, std) in enumerate(seen):
        assert (mean, std) == pytest.approx(NODES[max(0, 2 - index // 7)], abs=1e-8)
    assert torch.equal(answer, made.teacher(x_t, t, cond, uncond, 1.0)) and made.path.node is None
    assert all(torch.equal(a, b) for a, b in zip(teacher, made.teacher.denoiser.parameters()))


def test_nodes_have_no_guidance_and_the_teacher_has() -> None:
    made = playing.objective(DMD2, dit(), guidance=3.0, gan=0.0, gan_critic=0.0)
    cond, uncond = made.teacher.encode(torch.arange(2))
    x_t, t = torch.randn(2, *made.teacher.shape), torch.full((2,), 500)
    guided, plain = made.real(x_t, t, cond, uncond), made.teacher.denoiser(x_t, t, cond)
    assert not torch.allclose(guided, plain)
    made.path._copy, made.path._loaded = made.teacher.copy(), 1
    torch.testing.assert_close(made.real(x_t, t, cond, uncond), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index", [2, 1, 0])
def test_the_generator_converges_to_the_node(
    index: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exact critic it stops at (M_i, sqrt V_i). Unweighted: of one number, 1 / |x - real| has no expectation."""
    for module in (dmd2, disback):
        monkeypatch.setattr(module, "per_sample_weight", lambda x, real: 1.0)
    made = recorded("epsilon", tmp_path, method)
    step, student = 60 + 7 * (2 - index), made.generator.denoiser.network
    for _ in range(50):
        put(made.fake.network, *posterior(student.bias.item(), student.gain.item()))
        turns = made.step(item(), step)
        player, loss = next(turns)
        assert player == "generator"
        loss.backward()
        turns.close()
        descend(student, 1.0)
    assert (student.bias.item(), student.gain.item()) == pytest.approx(NODES[index], abs=1e-7)


# --- files


def nodes_of(run: Path) -> ScoreDistillation:
    """A tiny teacher's method that has recorded one node, at step 1 of 2."""
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    made = playing.objective(DisBack, teacher, run, backtrack=2, backtrack_nodes=2)
    for step in range(2):
        play(made, step, batch(teacher, step, real=False))
        with torch.no_grad():
            for p in made.fake.parameters():
                p.add_(p.grad, alpha=-0.1)
                p.grad = None
    return made


def test_a_node_is_what_the_critic_was(tmp_path: Path) -> None:
    made = nodes_of(tmp_path)
    made.path.visit(2, made.fake)
    stored = load_file(tmp_path / "backtrack/node-001.safetensors")
    assert made.path.node is not None and made.path.node.network.state_dict().keys() == stored.keys()
    assert all(torch.equal(stored[k], v) for k, v in made.path.node.network.state_dict().items())
    assert any(not torch.equal(stored[k], v) for k, v in made.fake.network.state_dict().items())  # it has moved on
    assert not any(p.requires_grad for p in made.path.node.parameters())
    again = playing.objective(DisBack, made.teacher, tmp_path, backtrack=2, backtrack_nodes=2)
    again.path.visit(1, again.fake)  # after a resume: what is there stays
    assert all(torch.equal(stored[k], v) for k, v in load_file(tmp_path / "backtrack/node-001.safetensors").items())


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "changed":
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    elif how == "other":
        teacher = EDMTeacher(edm_pipeline(classes=None), Facts("x"))
        Backtrack(path.parents[1] / "other", teacher, 2, 2, 1)._save(1, teacher.copy())
        shutil.copy(path.parents[1] / "other/backtrack" / path.name, path)
    else:
        path.write_bytes(b"nothing of the kind")


@pytest.mark.parametrize("how", ["missing", "cut", "changed", "other", "no safetensors"])
def test_a_node_that_cannot_be_used_is_one_line(how: str, tmp_path: Path) -> None:
    made = nodes_of(tmp_path)
    spoil(made.path.path(1), how)
    with pytest.raises(ValueError, match=r"node-001.safetensors cannot be used: .* Start over with --restart") as caught:
        play(made, 2, batch(made.teacher, 2, real=False))
    assert "\n" not in str(caught.value)


# --- whole runs


def trainer(tiny_teacher: Path, run: Path, **options: Any) -> Trainer:
    """DisBack over 10 steps: recording to 4, with nodes at 1 and 2, one of them as the target until 6 and until 8."""
    given = {"teacher": str(tiny_teacher), "output": str(run), "device": "cpu", "batch_size": 8, "iterations": 10}
    given |= {"backtrack": 4, "backtrack_nodes": 3, "backtrack_steps": 2, "warmup": 0, "init_rho": 2.5} | options
    return make_trainer(*resolve(DisBack.Config, {}, {"method": "disback"} | given, {}))


def go_on(made: Trainer, until: int) -> None:
    while made.step < until:
        made.update()
        made.step += 1


def go(made: Trainer, until: int) -> dict[str, Tensor]:
    """From the last checkpoint to a step; every weight and every state of an optimiser there."""
    made.resume()
    go_on(made, until)
    found = {f"{name} {key}": v for name, network in made._saved.items() for key, v in network.state_dict().items()}
    for name, optimizer in made.optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            found |= {f"{name} {index} {slot}": torch.as_tensor(value) for slot, value in slots.items()}
    return found


@pytest.fixture(scope="module")
def whole(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return go(trainer(tiny_teacher, tmp_path_factory.mktemp("whole")), 10)


@pytest.mark.parametrize("saved, killed", [(1, 2), (5, 7), (8, 9)])
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    saved: int, killed: int, whole: dict[str, Tensor], tiny_teacher: Path, tmp_path: Path
) -> None:
    """In the middle of recording, on the way back, and after it; some steps are taken twice."""
    first = trainer(tiny_teacher, tmp_path)
    go(first, saved)
    first.save()
    go_on(first, killed)
    resumed = go(trainer(tiny_teacher, tmp_path), 10)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_micro_batches_are_one_batch(whole: dict[str, Tensor], tiny_teacher: Path, tmp_path: Path) -> None:
    split = go(trainer(tiny_teacher, tmp_path, accumulation=4), 10)
    for player in ("generator-0", "critic-0"):
        parts = [(split[key], whole[key]) for key in whole if key.startswith(player)]
        difference = torch.cat([(a - b).flatten() for a, b in parts]).norm()
        assert difference < 1e-4 * torch.cat([b.flatten() for _, b in parts]).norm()


def test_a_critic_that_is_an_adapter(tiny_teacher: Path, tmp_path: Path) -> None:
    """Nodes are adapters too: small files, and another adapter on the one base."""
    made = trainer(tiny_teacher, tmp_path, critic="lora", rank=2)
    base = {key: value.clone() for key, value in made.teacher.denoiser.network.state_dict().items() if "lora" not in key}
    go(made, 5)
    path = made.objective.path
    stored, critic = load_file(path.path(2)), unwrap(made.objective.fake.network).state_dict()
    assert stored.keys() == critic.keys() and all("lora" in key for key in stored)
    (node,) = path.kept()
    assert all(torch.equal(stored[key], value) for key, value in node.network.state_dict().items())
    go_on(made, 10)
    assert path.node is None
    after = made.teacher.denoiser.network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in base.items())
    resumed = trainer(tiny_teacher, tmp_path / "again", critic="lora", rank=2)
    go(resumed, 5)
    resumed.save()
    twice = go(trainer(tiny_teacher, tmp_path / "again", critic="lora", rank=2), 10)
    assert all(torch.equal(twice[key], value) for key, value in go(made, 10).items() if key in twice)


def test_the_command_line(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--method",
        "disback",
        "--teacher",
        str(tiny_teacher),
        *TINY,
        "--iterations",
        "4",
        "--output",
        str(tmp_path / "run"),
    ]
    argv += ["--backtrack", "2", "--backtrack-nodes", "2", "--backtrack-steps", "1"]
    assert main(argv) == 0 and (tmp_path / "run/export/model_index.json").is_file()
    with pytest.raises(SystemExit):
        main([*argv, "--backtrack-nodes", "3", "--restart"])
    assert "backtrack_nodes 3 is more than the 2 steps" in capsys.readouterr().err


# --- memory


def planned(tiny_teacher: Path, **options: Any) -> Run:
    given = {"teacher": str(tiny_teacher), "batch_size": 4, "device": "cpu", "rank": 2, "method": "disback"}
    return Run(*resolve(objective_class("disback").Config, {}, given | options, {}), Blank(str(tiny_teacher)))


@pytest.mark.parametrize("critic", ["full", "lora"])
def test_the_plan_counts_the_copy_that_holds_a_node(critic: str, tiny_teacher: Path) -> None:
    on, off = (sum(planned(tiny_teacher, critic=critic, backtrack=n).memory().weights.values()) for n in (8, 0))
    (node,) = planned(tiny_teacher, critic=critic, backtrack=8).objective.kept()
    assert on - off == sum(p.numel() * p.element_size() for p in node.parameters()) > 0


def test_turns_are_planned_with_the_final_target(tiny_teacher: Path) -> None:
    on, off = (planned(tiny_teacher, backtrack=n).turns() for n in (8, 0))
    assert on.keys() == off.keys() == {"generator", "critic"}
    for player, turn in off.items():
        assert on[player].kept == pytest.approx(turn.kept, rel=0.01)


def test_a_run_that_ends_before_the_teacher_is_refused(tmp_path: Path) -> None:
    flags = {"teacher": "digits", "output": str(tmp_path / "run"), "cache": str(tmp_path / "cache"), "batch_size": "4"}
    flags |= {"gan": "0", "gan_critic": "0", "backtrack": "4", "backtrack_nodes": "2", "backtrack_steps": "3"}
    with pytest.raises(ValueError, match="at step 7; type more"):
        make_trainer(*resolve(DMD2.Config, {}, {}, flags | {"iterations": "7"}))
    assert make_trainer(*resolve(DMD2.Config, {}, {}, flags | {"iterations": "8"})).objective.settled == 7
