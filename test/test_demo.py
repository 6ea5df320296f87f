"""The main job: arguments, data, what it does with checkpoints, and one small run that really dies
and resumes."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from examples.demo import data, launch, plot, report, run, train
from examples.demo.__main__ import main
from examples.demo.crash import Crash
from examples.demo.journal import Journal, Tail
from examples.demo.progress import Progress
from torch_hsdp_ckpt import _C, save
from torch_hsdp_ckpt.checkpoint.storage.metadata import encode_metadata
from torch_hsdp_ckpt.training import run_directory as checkpoints
from torch_hsdp_ckpt.training.run_directory import Retention

SMALL = ("--width", "32", "--layers", "1", "--length", "32")


def not_a_directory(path: Path) -> str:
    (path / "file").write_text("")
    return str(path / "file" / "demo")


def foreign(path: Path) -> str:
    (path / "thesis.tex").write_text("years of work")
    return str(path)


def short_file(path: Path) -> str:
    (path / "short.txt").write_text("a" * data.LENGTH)
    return str(path / "short.txt")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--ranks", "4", "--replicas", "3"], "--replicas 3 does not divide --ranks 4"),
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--replicas", "0"], "--replicas must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 2"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (
            ["--data", "/no/such/file"],
            "cannot read the data file /no/such/file: No such file or directory",
        ),
        (["--data", "/"], "cannot read the data file /: Is a directory"),
        (
            ["--data", "/dev/null"],
            "the data holds 0 bytes; one training sequence needs more than 128",
        ),
        (
            ["--data", short_file],
            "the data holds 128 bytes; one training sequence needs more than 128",
        ),
        (["--dir", not_a_directory], "/file/demo: Not a directory"),
        (["--dir", foreign], "holds other things than a demo's"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str | Callable[[Path], str]],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--dir", str(tmp_path / "run")] + [
        a if isinstance(a, str) else a(tmp_path) for a in arguments
    ]
    try:
        code = main(argv)
    except SystemExit as exit:  # argparse's own errors
        code = exit.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert says in output.err
    assert output.err.count("\n") == 1


def test_a_directory_is_cleared_of_the_demos_own_files_only(tmp_path: Path) -> None:
    options = run.Options(directory=tmp_path / "run")
    run.check(options)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "job" / "step-000001").mkdir(parents=True)
    (tmp_path / "run" / "report.txt").write_text("old")
    run.check(options)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".torch_hsdp_ckpt_demo",
        "notes.txt",
    ]


@pytest.mark.parametrize("steps", [2, 3, 5, 9, 10, 40, 101])
def test_the_crash_has_a_save_before_it(steps: int) -> None:
    options = run.Options(steps=steps)
    assert options.save_every < options.crash_step <= steps
    assert options.crash_step % options.save_every == 0


@pytest.mark.parametrize(
    "ranks, replicas",
    [(1, 1), (2, 1), (2, 2), (3, 3), (4, 1), (4, 2), (4, 4), (6, 3), (6, 2), (7, 7), (16, 4)],
)
def test_half_the_ranks_make_a_mesh_and_share_the_batch(ranks: int, replicas: int) -> None:
    options = run.Options(ranks=ranks, replicas=replicas)
    half, rows = options.half
    assert half == ranks // 2
    assert rows == 0 or half % rows == 0
    assert options.batch >= 8
    assert options.batch % ranks == 0
    assert half == 0 or options.batch % half == 0


def test_a_step_sees_the_same_data_on_any_number_of_ranks() -> None:
    text = torch.randint(
        0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    whole = data.sample(text, 7, range(8), 20, seed=3)
    for ranks in (1, 2, 4, 8):
        parts = [
            data.sample(text, 7, data.share(rank, ranks, 8), 20, seed=3) for rank in range(ranks)
        ]
        for index in (0, 1):
            assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])
    tokens, targets = whole
    assert tokens[:, 0].tolist() == [data.BOS] * 8
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    starts = data.positions(7, range(8), 1000, 20, seed=3)
    assert torch.equal(targets[5], text[starts[5] : starts[5] + 20].long())
    assert all(0 <= start <= 980 for start in starts)
    assert starts != data.positions(8, range(8), 1000, 20, seed=3)


def test_the_default_text_is_pythons_own_source() -> None:
    text = data.read_text(None, data.LENGTH)
    assert len(text) > 10**6
    assert b"class ArgumentParser" in text


def make_checkpoint(root: Path, step: int, committed: bool = True) -> None:
    path = checkpoints.path_of(root, step)
    path.mkdir(parents=True)
    name = _C.data_file_name(0, _C.new_save_id(claimed=False), 0)
    (path / name).write_bytes(b"data")
    if committed:
        place = _StorageInfo(name, 0, 4)
        metadata = Metadata({"x": BytesStorageMetadata()}, storage_data={MetadataIndex("x"): place})
        (path / ".metadata").write_bytes(encode_metadata(metadata))


def test_pruning_counts_committed_checkpoints_only(tmp_path: Path) -> None:
    def prune(keep: int) -> list[int]:
        return checkpoints.prune(tmp_path, checkpoints.contents(tmp_path), Retention(0, keep))

    def there() -> tuple[list[int], list[int]]:
        found = checkpoints.contents(tmp_path)
        return [each.step for each in found.committed], list(found.incomplete)

    assert prune(2) == []
    for step in (10, 20, 40):
        make_checkpoint(tmp_path, step)
    for step in (5, 30, 50):
        make_checkpoint(tmp_path, step, committed=False)
    (tmp_path / "step-best").mkdir()
    assert there() == ([10, 20, 40], [5, 30, 50])
    assert prune(2) == [10]
    assert there() == ([20, 40], [5, 30, 50])  # what is incomplete goes by the next save
    assert (tmp_path / "step-best").is_dir()
    # One is cut short: of two good ones to be kept only one is left.
    next((tmp_path / "step-000040").glob("*.distcp")).write_bytes(b"dat")
    assert prune(2) == []
    assert prune(1) == []
    assert there() == ([20, 40], [5, 30, 50])


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "log.jsonl")
    assert tail.new() == []
    with Journal(tmp_path / "log.jsonl") as journal:
        journal.write("step", step=1, hex=(0.1).hex())
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "st')
    events = tail.new()
    assert [event["event"] for event in events] == ["step"]
    assert float.fromhex(events[0]["hex"]) == 0.1
    assert tail.new() == []


def made_up_run(
    name: str, losses: dict[int, float], resumed: int = 0, skipped: tuple[int, ...] = ()
) -> report.Run:
    steps = [{"event": "step", "step": step, "hex": loss.hex()} for step, loss in losses.items()]
    return report.Run(
        name, [{"event": "resume", "step": resumed, "skipped": list(skipped)}, *steps]
    )


def test_a_claim_fails_on_a_single_bit() -> None:
    reference = made_up_run("reference", {step: 1.0 / step for step in range(1, 7)})
    equal = made_up_run("same", {step: 1.0 / step for step in range(4, 7)}, resumed=3)
    one_bit = made_up_run("same", {4: 1 / 4, 5: 1 / 5, 6: 1 / 6 + 2**-55}, resumed=3)
    missing = made_up_run("same", {4: 1 / 4, 5: 1 / 5}, resumed=3)
    nothing_left = made_up_run("same", {}, resumed=6)
    assert report.same_bits(reference, equal, 6).passed
    assert not report.same_bits(reference, one_bit, 6).passed
    assert not report.same_bits(reference, missing, 6).passed
    assert not report.same_bits(reference, nothing_left, 6).passed
    assert report.within_rounding(reference, one_bit, 6).passed
    assert not report.within_rounding(reference, missing, 6).passed
    assert not report.within_rounding(
        reference, made_up_run("far", {4: 0.2501, 5: 0.2, 6: 1 / 6}, resumed=3), 6
    ).passed


def test_a_claim_fails_where_a_checkpoint_was_lost_or_misread() -> None:
    crash = Crash(step=6, files=2, bytes=100)
    assert report.resume_claim(made_up_run("r", {}, 3, (6,)), crash, committed=3).passed
    assert not report.resume_claim(made_up_run("r", {}, 0, (3, 6)), crash, committed=3).passed
    assert not report.crash_claim(None, 0, 4).passed
    found: dict[str, Any] = {
        "torch": "2",
        "tensors": 2,
        "bytes": 8,
        "memory": [],
        "other": [],
        "foreign": [],
    }
    assert all(claim.passed for claim in report.stock_claims(found))
    assert not report.stock_claims({**found, "memory": ["model.head.weight"]})[0].passed
    assert not report.stock_claims({**found, "foreign": ["torch_hsdp_ckpt"]})[0].passed
    assert not report.stock_claims({**found, "other": ["model.head.weight"]})[1].passed
    assert not any(claim.passed for claim in report.stock_claims({**found, "tensors": 0}))


def test_without_matplotlib_the_demo_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    nothing = made_up_run("r", {})
    with pytest.raises(plot.NoMatplotlibError, match="pip install matplotlib"):
        plot.save(tmp_path / "loss.png", nothing, nothing, [nothing], Crash(1, 1, 1))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere() -> None:
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        progress = Progress(20, stream, every=5)
        for step in range(20):
            progress.advance("train", f"step {step + 1}", 1)
        progress.close()
    assert "\n" not in terminal.getvalue()
    assert "100 %" in terminal.getvalue()
    assert "\x1b" not in plain.getvalue()
    assert [line.split()[-1] for line in plain.getvalue().splitlines()] == ["1", "6", "11", "16"]


def trainer_arguments(root: Path, *more: str) -> argparse.Namespace:
    return train.parse(["--dir", str(root), "--batch", "4", *SMALL, *more])


def train_and_resume(rank: int, root: Path) -> tuple[list[float], list[float], list[float]]:
    text = bytes(range(256)) * 8
    arguments = trainer_arguments(root, "--replicas", "2", "--dropout", "0.2")
    first = train.Trainer(arguments, torch.device("cpu"), text)
    before = [first.train_step() for _ in range(2)]
    save(first.state(), checkpoint_id=root / "step-000002")
    after = [first.train_step() for _ in range(3)]
    second = train.Trainer(arguments, torch.device("cpu"), text)
    second.load(root / "step-000002")
    assert second.step == 2
    resumed = [second.train_step() for _ in range(3)]
    other = train.Trainer(arguments, torch.device("cpu"), text[:-1])
    with pytest.raises(train.UsageError, match="other data"):
        other.load(root / "step-000002")
    return before, after, resumed


def test_random_numbers_travel_in_the_checkpoint(tmp_path: Path) -> None:
    results = run_ranks(train_and_resume, 4, tmp_path)
    before, after, resumed = results[0]
    assert all(result == results[0] for result in results)
    assert before[0] != before[1]
    assert resumed == after  # dropout drew the same numbers: to the last bit


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--replicas", "3"], "--replicas 3 does not divide the 4 ranks"),
        (["--batch", "6"], "--batch 6 does not divide over 4 ranks"),
        (["--save-every", "0"], "--save-every must be at least 1, got 0"),
        (["--data", "/no/such/file"], "cannot read the data file /no/such/file"),
    ],
)
def test_the_training_script_checks_its_arguments(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(train.UsageError, match=says):
        train.check(trainer_arguments(tmp_path, *arguments))


def alive_with(word: str) -> list[str]:
    lines = [
        Path(f"/proc/{pid}/cmdline")
        for pid in os.listdir("/proc")
        if pid.isdigit() and int(pid) != os.getpid()
    ]
    return [
        text
        for line in lines
        if line.exists() and word in (text := line.read_text(errors="replace"))
    ]


def test_a_failing_run_shows_the_rank_that_failed(tmp_path: Path) -> None:
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)  # only rank 0 opens it
    arguments = ["--dir", str(tmp_path / "run"), "--steps", "2", "--replicas", "1", *SMALL]
    with (
        pytest.raises(
            launch.JobError,
            match=r"(?s)the broken run failed .*rank 0 of 2 raised IsADirectoryError.*log\.jsonl",
        ),
        launch.Job("broken", 2, arguments, tmp_path / "logs") as job,
    ):
        while job.running():
            pass
    assert alive_with(str(tmp_path)) == []


@pytest.mark.parametrize(
    "ranks, replicas, claims",
    [
        (2, 2, 7),
        pytest.param(1, 1, 6, marks=pytest.mark.soak),
        pytest.param(3, 3, 7, marks=pytest.mark.soak),
        pytest.param(4, 1, 7, marks=pytest.mark.soak),
        pytest.param(4, 2, 7, marks=pytest.mark.soak),
        pytest.param(6, 3, 7, marks=pytest.mark.soak),
    ],
)
def test_the_whole_demo_small(ranks: int, replicas: int, claims: int, tmp_path: Path) -> None:
    root = tmp_path / "run"
    options = run.Options(ranks=ranks, replicas=replicas, steps=10, directory=root, model=SMALL)
    run.check(options)
    output = io.StringIO()
    passed = run.Demo(options, output).run()
    text = (root / "report.txt").read_text()
    assert text in output.getvalue()
    assert passed, text
    assert f"{claims} of {claims} claims hold" in text
    assert text.count("PASS") == claims
    assert "FAIL" not in text
    assert f"SIGKILL to torchrun and {ranks} ranks in the save of step" in text
    assert (root / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # The job was cut off in a save and came back: two starts, one end, in one log.
    events = [event["event"] for event in Tail(root / "job" / "log.jsonl").new()]
    assert [events.count(event) for event in ("start", "resume", "end")] == [2, 2, 1]
    died = events.index("start", 1)
    assert events[died - 1] == "save"
    found = checkpoints.contents(root / "job")
    assert [each.step for each in found.committed] == [8, 10]
    assert (found.incomplete, found.foreign) == ([], [])
    assert alive_with(str(tmp_path)) == []
