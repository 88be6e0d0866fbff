"""What lies beside the results of a study, for a reader who repeats it: recipe and environment."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

import layerfuse
from layerfuse.hardware import device
from layerfuse.recipe.schema import Recipe

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as the YAML that stands beside results, arms spelled out with their defaults.

    Args:
        recipe: of the study.
    """
    plain = recipe.model_dump(mode="json", exclude_none=True)
    plain["arms"] = [arm.model_dump(mode="json", exclude_none=True) for arm in recipe.all_arms()]
    plain["baseline"] = recipe.baseline_name
    if recipe.seed_rule is not None:
        plain["auto_seeds"] = recipe.seed_rule.model_dump(mode="json")
        # They are all that may be trained: the rule says which are.
        for arm in plain["arms"]:
            del arm["seeds"]
    if recipe.step_rule is not None:
        plain["auto_steps"] = recipe.step_rule.model_dump(mode="json")
    # They are contained in the arms.
    plain.pop("grid", None)
    plain.pop("fusion_defaults", None)
    plain.pop("baseline_seeds", None)
    return yaml.safe_dump(plain, sort_keys=False)


def environment(recipe: Recipe, samples: str) -> dict[str, str]:
    """Versions, commit and device: what a reader needs to repeat the study.

    Args:
        recipe: of the study.
        samples: the digest of its samples.
    """
    root = Path(__file__).parents[3]
    commit = ""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    return {
        "layerfuse": layerfuse.__version__,
        "commit": commit or "not a git checkout",
        "samples": samples,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": str(device()),
        "dtype": recipe.dtype,
        "cpu threads": str(torch.get_num_threads()),
        "cpus": str(os.cpu_count()),
    }
