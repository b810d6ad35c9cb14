"""DSPy's `LM.finetune`, unmodified, against a true `pennyweight serve`: only its address is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip(
    "fastapi", reason="the server's extra is not installed: pip install -e .[serve]"
)
if find_spec("dspy") is None:
    pytest.skip("DSPy is not installed: pip install -e .[clients-test]", allow_module_level=True)

from campaigns.server import Server

# It looks after its job every twenty seconds, which a test has no time for.
STORY = """
import json, sys, time
slept = time.sleep
time.sleep = lambda seconds: slept(min(seconds, 0.3))
import dspy
from dspy.clients.utils_finetune import TrainDataFormat
lm = dspy.LM("openai/base", custom_llm_provider="openai", cache=False, temperature=0, max_tokens=8)
rows = [
    {"messages": [
        {"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"said {n}"}
    ]}
    for n in range(6)
]
job = lm.finetune(rows, TrainDataFormat.CHAT, {"n_epochs": 1, "batch_size": 3})
tuned = job.result()
said = [model("say 1") for model in (lm, tuned)]
print(json.dumps({"model": tuned.model, "said": said, "status": job.status().value}))
"""


def test_a_language_model_is_tuned_and_asked(tmp_path: Path) -> None:
    with Server(tmp_path / "data") as server:
        done = subprocess.run(
            [sys.executable, "-c", STORY],
            env={
                **os.environ,
                "OPENAI_BASE_URL": server.url,
                "OPENAI_API_KEY": server.key,
                "DSPY_CACHEDIR": str(tmp_path / "dspy"),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # its prices would be fetched
                "HOME": str(tmp_path),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "succeeded"
    assert told["model"].startswith("ft:base:default:")
    assert all(said and str(said[0]) for said in told["said"])
