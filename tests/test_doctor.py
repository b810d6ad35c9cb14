"""The doctor always answers, with one fix a line and no secret."""

import pytest

from pennyweight import doctor as room
from pennyweight.doctor import doctor


def test_every_finding_that_is_not_well_has_a_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor()
    names = [check.name for check in found]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "transformers", "processor", "memory", "folder here"} <= set(names)
    assert all(check.ok or check.mend for check in found)
    assert all("\n" not in check.found + check.mend for check in found)


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    found = doctor()
    assert any(check.found == "a token is set" for check in found)
    assert "hf_canary" not in repr(found)


def test_a_broken_install_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> str:
        raise OSError("unreadable")

    monkeypatch.setattr(room.metadata, "version", broken)
    found = doctor()
    assert any(not check.ok and "unreadable" in check.found for check in found)
    assert any(check.name == "memory" for check in found)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13)), ("5.3.0rc1", (5, 3)), ("1", (1,)), ("2.9.post1", (2, 9))],
)
def test_versions_are_compared_as_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert room._numbers(version) == numbers


def test_each_gpu_has_its_kernels_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("pennyweight.quant.kernels.why_pure_torch", lambda device: "")
    monkeypatch.setattr(
        "pennyweight.blocks.kernels.why_eager",
        lambda name, device: "no compiler" if device.index and name != "norm" else "",
    )
    one, two = room._gpu_kernels()
    assert one.found == "4-bit, norm, feed_forward, rotation by Triton"
    assert two.found.startswith("4-bit, norm by Triton;")
    assert two.found.count("no compiler") == 1
    assert one.name != two.name
