"""Checkpoints that a run continues from exactly: safetensors and JSON only, complete or not there at all.

``accelerator.save_state`` would pickle all but the weights, load the pickles without a check, and pass over a random state
that it cannot restore. Here the state is a tree of tensors and plain values: tensors in a safetensors file, the tree in its
header.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from free.outputs import writing

_PREFIX = "checkpoint-"
_PARTIAL = "partial-"
_CONFIG, _STATE = "training.json", "training.safetensors"


def save_tree(tree: Any, file: Path) -> None:
    """Write a tree of dicts (keys str or int), lists, tensors and JSON's plain values; tuples become lists."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            name = str(len(tensors))
            # a copy: the format refuses tensors that share memory
            tensors[name] = node.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[key, plain(value)] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return [plain(value) for value in node]
        return node

    text = json.dumps(plain(tree))
    save_file(tensors, file, metadata={"tree": text})


def load_tree(file: Path) -> Any:
    """What :func:`save_tree` wrote, tensors on the CPU.

    Raises:
        ValueError: the file is missing, corrupt or truncated.
    """

    def restored(node: Any) -> Any:
        if isinstance(node, list):
            return [restored(value) for value in node]
        if isinstance(node, dict):
            if "tensor" in node:
                return opened.get_tensor(node["tensor"])
            return {key: restored(value) for key, value in node["dict"]}
        return node

    try:
        with safe_open(file, "pt") as opened:
            return restored(json.loads(opened.metadata()["tree"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint file {str(file)!r} is missing, corrupt or truncated: {error}") from error


def random_state() -> dict[str, Any]:
    """Of Python, numpy, torch, and this process's GPU, as a tree."""
    version, internal, gauss = random.getstate()
    of_numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is what libraries draw from
    key = torch.from_numpy(of_numpy["state"]["key"].astype(np.int64))
    return {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": {**of_numpy, "state": {**of_numpy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where :func:`random_state` was taken."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    of_numpy = state["numpy"]
    key = of_numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**of_numpy, "state": {**of_numpy["state"], "key": key}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Checkpoints:
    """The checkpoints of a run, folders ``checkpoint-{step}`` in its output folder.

    Args:
        accelerator: of the run.
        output_dir: the run's.
        configuration: what a run that continues one of them must share, JSON's plain values.
        limit: how many are kept, the oldest going first; None keeps all.
    """

    def __init__(self, accelerator: Any, output_dir: Path, configuration: dict[str, Any], limit: int | None) -> None:
        self.accelerator, self.output_dir, self.configuration, self.limit = accelerator, output_dir, configuration, limit

    def all(self) -> list[Path]:
        """Oldest first."""
        found = {
            int(path.name.removeprefix(_PREFIX)): path
            for path in self.output_dir.glob(f"{_PREFIX}*")
            if path.name.removeprefix(_PREFIX).isdecimal()
        }
        return [path for _, path in sorted(found.items())]

    def find(self, resume: str | None) -> Path | None:
        """The folder that ``resume`` names: None, ``"latest"`` (None if there is none yet), or a path.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: nothing is to be resumed, and the output folder holds another run's checkpoints.
        """
        found = self.all()
        if resume is None:
            if found:
                raise ValueError(
                    f"output_dir {str(self.output_dir)!r} holds {found[-1].name}; give resume_from_checkpoint='latest' to "
                    "continue that run, or another output_dir"
                )
            return None
        if resume == "latest":
            return found[-1] if found else None
        # as in diffusers' examples, a bare name is one in the output folder
        for folder in (Path(resume), self.output_dir / resume):
            if folder.is_dir():
                return folder
        raise FileNotFoundError(f"resume_from_checkpoint is {resume!r}, which is not a folder")

    def save(self, step: int, shared: Any, own: Any, save_drafter: Callable[[Path], None]) -> None:
        """Write a checkpoint. Called by every process.

        Args:
            step: training steps done.
            shared: a tree that all processes agree on.
            own: a tree of this process's.
            save_drafter: writes the drafter, so that the checkpoint is one itself.
        """
        accelerator, folder = self.accelerator, self.output_dir / f"{_PREFIX}{step}"
        partial = self.output_dir / f"{_PARTIAL}{folder.name}"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        # if this fails, earlier checkpoints stay whole
        with writing(f"checkpoint of step {step}", self.output_dir):
            save_tree(own, partial / self._own_file())
            if accelerator.is_main_process:
                save_drafter(partial)
                save_tree(shared, partial / _STATE)
                text = json.dumps({"step": step, "configuration": self.configuration}, indent=2)
                (partial / _CONFIG).write_text(text + "\n", encoding="utf-8")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in self.all()[: -self.limit] if self.limit else []:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def load(self, folder: Path) -> tuple[int, Any, Any]:
        """Step, shared tree and this process's own.

        Raises:
            ValueError: a checkpoint of another configuration, whose differing fields are named, or a broken one.
        """
        file = folder / _CONFIG
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            step, configuration = saved["step"], saved["configuration"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"checkpoint file {str(file)!r} is missing or corrupt: {error}") from error
        expected = json.loads(json.dumps(self.configuration))
        names = sorted(expected.keys() | configuration.keys())
        different = [name for name in names if expected.get(name) != configuration.get(name)]
        if different:
            listed = "; ".join(f"{name} {configuration.get(name)!r}, here {expected.get(name)!r}" for name in different)
            raise ValueError(f"checkpoint {str(folder)!r} is of another configuration: {listed}")
        return step, load_tree(folder / _STATE), load_tree(folder / self._own_file())

    def _own_file(self) -> str:
        return f"process-{self.accelerator.process_index}.safetensors"
