"""The README's examples run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

CHECK = """
for parameter in model.parameters():
    mine = parameter.to_local().detach()
    others = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(others, mine, group=mesh.get_group("replicate"))
    assert all(torch.equal(mine, other) for other in others), "replicas differ"
"""
README = Path(__file__).parent.parent / "README.md"


def test_example_runs_under_torchrun(tmp_path: Path) -> None:
    code, going_on = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    last = "dist.destroy_process_group()\n"
    assert code.endswith(last)
    (tmp_path / "train.py").write_text(code.removesuffix(last) + CHECK + going_on + last)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        "train.py",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "checkpoint" / ".metadata").is_file()
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        f"step-{step:06}" for step in (800, 900, 1000)
    ]
