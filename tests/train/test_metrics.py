"""Numbers while training: FLOPs and MFU against a count by hand, and logs that a resumed run continues."""

import dataclasses
import json

import jax
import pytest

from jaxdistill.models import Lora, ModelConfig, init_model, params_of
from jaxdistill.train.flops import FlopCounter, mfu, peak_flops
from jaxdistill.train.metrics import METRICS, MetricsLog, Outputs
from tests.train.test_step import CONFIG


def test_flops_a_token_are_six_a_weight_that_multiplies():
    params = params_of(init_model(CONFIG, 0))
    layers = params["layers"]
    matrices = sum(layers[m].size for m in ("q", "k", "v", "o", "gate", "up", "down"))
    counter = FlopCounter(CONFIG)
    assert counter.per_token == 6 * (matrices + params["embed"].size)  # tied: the embedding projects
    untied = ModelConfig.from_hf(CONFIG.to_hf() | {"tie_word_embeddings": False})
    assert FlopCounter(untied).per_token == counter.per_token
    lora = Lora.of(2, 4.0)
    adapters = 2 * CONFIG.num_layers * sum(layers[m].shape[1] + layers[m].shape[2] for m in lora.targets)
    assert FlopCounter(CONFIG, lora).per_token == 4 * (matrices + params["embed"].size) + 6 * adapters


def test_flops_of_attention_are_those_of_scores_and_values():
    T = 10
    pairs = CONFIG.num_layers * T * (T + 1) // 2
    forward = 2 * (2 * CONFIG.num_heads * CONFIG.head_dim) * pairs  # q k, and p v: 2 FLOPs a number each
    assert FlopCounter(CONFIG).of(0, pairs) == 3 * forward


@dataclasses.dataclass
class Device:
    device_kind: str


def test_peaks_are_known_by_kind_and_no_cpu_has_one():
    assert peak_flops(Device("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(Device("NVIDIA H100 PCIe")) == 756e12
    assert peak_flops(Device("TPU v5 lite")) == 197e12
    assert peak_flops(Device("TPU v5p")) == 459e12
    assert peak_flops(jax.devices()[0]) is None
    assert peak_flops(jax.devices()[0], 0.5) == 5e11
    assert mfu(1e12, 2.0, 1e12, 2) == 0.25
    assert mfu(1e12, 2.0, None, 2) is None


def values(loss=2.0, count=10.0, bad=0.0, **more):
    return {
        "loss": loss, "count": count, "accuracy": 0.5, "gradient_norm": 1.0, "learning_rate": 0.1, "tokens": 30.0,
        "pairs": 100.0, "bad": bad, "skipped": bad, **more,
    }  # fmt: skip


def log():
    return MetricsLog(FlopCounter(CONFIG), 1e12, 1)


def test_a_line_is_the_mean_of_the_good_steps_by_trained_tokens():
    made = log()
    made.add(0, values(1.0, 30.0))
    made.add(1, values(5.0, 10.0))
    made.add(2, values(float("nan"), 10.0, bad=1.0))
    line = made.line()
    assert line["loss"] == pytest.approx(2.0)
    assert (line["step"], line["tokens"], line["trained_tokens"], line["skipped"]) == (3, 90, 40, 1)
    assert line["mfu"] > 0 and line["host_memory_gib"] > 0 and line["device_memory_gib"] is None


def test_what_only_some_steps_have_is_the_mean_of_those():
    made = log()
    made.add(0, values(4.0, 10.0))
    assert "on_policy_kd" not in made.line()
    made.add(1, values(4.0, 10.0))
    made.sampled(1e-3)
    made.add(2, values(1.0, 10.0, on_policy_kd=3.0, finished=0.5))
    made.add(3, values(1.0, 30.0, on_policy_kd=1.0, finished=0.1))
    line = made.line()
    assert line["loss"] == pytest.approx(1.6)
    assert (line["on_policy_kd"], line["finished"]) == (pytest.approx(1.5), pytest.approx(0.2))
    assert line["sampling_share"] > 0


def test_what_a_checkpoint_carries_makes_the_log_go_on_as_if_never_stopped():
    names = ("step", "loss", "accuracy", "tokens", "trained_tokens", "sampled_tokens")
    whole, before = log(), log()
    for step in range(5):
        whole.add(step, values(float(step), sampled_tokens=7.0))
        if step < 3:
            before.add(step, values(float(step), sampled_tokens=7.0))
    after = log()
    after.carry_on(json.loads(json.dumps(before.carried())))
    for step in (3, 4):
        after.add(step, values(float(step), sampled_tokens=7.0))
    assert log().summary().keys() == whole.summary().keys() - {"sampled_tokens"}, "none off policy"
    want, got = whole.line(), after.line()
    assert {n: got[n] for n in names} == {n: want[n] for n in names} and want["sampled_tokens"] == 35


def test_lines_after_the_checkpoint_are_dropped_and_a_torn_one_too(tmp_path, tiny):
    (tmp_path / METRICS).write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    outputs = Outputs(tmp_path, tiny, after=4, say=print)
    outputs.write(METRICS, {"step": 5, "loss": float("nan")})
    outputs.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == [{"step": 2}, {"step": 4}, {"step": 5, "loss": None}]


def test_tensorboard_gets_every_number(tmp_path, tiny):
    from tensorboardX.proto.event_pb2 import Event

    outputs = Outputs(tmp_path, tiny, after=0, say=print)
    outputs.write(METRICS, {"step": 3, "loss": 0.5, "mfu": None})
    outputs.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):  # uint64 length, uint32 crc, record, uint32 crc
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += size + 16
    assert ("metrics/loss", 3, 0.5) in found


def test_a_disk_that_takes_no_lines_is_said_once(tmp_path, tiny):
    said = []
    outputs = Outputs(tmp_path, tiny, after=0, say=said.append)
    (tmp_path / METRICS).mkdir()
    for step in (1, 2):
        outputs.write(METRICS, {"step": step})
    outputs.close()
    assert len(said) == 1 and "training goes on without its lines" in said[0]


def test_weights_and_biases_is_asked_for_by_name(tmp_path, tiny):
    import importlib.util

    if importlib.util.find_spec("wandb"):
        pytest.skip("it is installed here")
    config = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, wandb="mine"))
    with pytest.raises(ValueError, match="pip install wandb"):
        Outputs(tmp_path, config, after=0, say=print)


@pytest.fixture
def tiny(tmp_path):
    from jaxdistill.config import load
    from tests.helpers import tiny_config

    return load(tiny_config(tmp_path))
