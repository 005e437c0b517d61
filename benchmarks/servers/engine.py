"""Folders in vLLM on a CPU: what it loads, and what it computes. Runs in the environment that has vLLM.

    python -m benchmarks.servers.engine JOBS

reads a JSON list of jobs and prints one line of JSON for each. A job has `case`, a name; `out`, the folder;
`plain`, the same model with its weights dequantized into float32; `format`; and `processes`.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
PROMPTS, WORDS, LONGEST = 4, 48, 64
LARGEST = {"fp8-channel": 448.0, "int8-channel": 127.0}  # formats whose inputs vLLM quantizes too
_CHOICES = re.compile(r"(select_\w*moe_backend|init_(fp8|mxfp4|mxfp8|nvfp4)_linear_kernel)")


class Enough(Exception):
    """Raised to stop vLLM when the weights are loaded."""


@contextlib.contextmanager
def watched(seen: dict[str, Any], stop: bool) -> Iterator[None]:
    """Notes the model and its parameters before vLLM alters them for its kernels, and may stop it there."""
    loader = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    further = loader.process_weights_after_loading

    def look(model: Any, *words: Any, **named: Any) -> Any:
        parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        seen.update(model=model, parameters=parameters)
        if stop:
            raise Enough
        return further(model, *words, **named)

    with mock.patch.object(loader, "process_weights_after_loading", look):
        yield


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Lets vLLM build layers for which this machine has no kernel: choices give a stand-in."""
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    with contextlib.ExitStack() as stack:
        for found in pkgutil.walk_packages(quantization.__path__, f"{quantization.__name__}."):
            with contextlib.suppress(Exception):  # a module for other hardware
                importlib.import_module(found.name)
        inside = [m for n, m in list(sys.modules.items()) if n.startswith(quantization.__name__)]
        for module in inside:
            for name in filter(_CHOICES.fullmatch, dir(module)):
                answer = (
                    (None, None) if "moe" in name else types.SimpleNamespace(input_quant_key=lambda: None)
                )
                stack.enter_context(mock.patch.object(module, name, lambda *_, answer=answer, **__: answer))
        yield


def prompts() -> list[list[int]]:
    """Random tokens, the same on every call."""
    import numpy as np

    return np.random.default_rng(0).integers(8, 500, (PROMPTS, WORDS)).tolist()


def stored(folder: str) -> dict[str, Any]:
    """Every tensor of a folder."""
    import safetensors.torch  # pyright: ignore[reportMissingImports]

    found: dict[str, Any] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def bits(tensor: Any, dtype: Any = None) -> Any:
    """A tensor as an array of integers of its size, after a change of dtype that loses nothing."""
    import torch  # pyright: ignore[reportMissingImports]

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = tensor.contiguous()
    if dtype is not None and dtype.is_floating_point and tensor.dtype.is_floating_point:
        wide = tensor.to(dtype)
        tensor = wide if bool((wide.to(tensor.dtype) == tensor).all()) else tensor
    return tensor.view(whole[tensor.element_size()]).numpy()


def judged(model: Any, parameters: dict[str, Any], folder: str) -> dict[str, Any]:
    """Which tensors of a folder are lost, and which parameters are not filled; and how many there are."""
    from benchmarks.servers.places import judge, parameter_name, place_of

    known = {parameter_name(name): p for name, p in parameters.items()}
    tensors: dict[str, Any] = {}
    for name, tensor in renamed(model, stored(folder)).items():
        into = known.get(name, known.get(place_of(name).parameter))
        tensors[name] = bits(tensor, None if into is None else into.dtype)
    found = judge({name: bits(p) for name, p in known.items()}, tensors)
    return {"tensors": len(tensors), "parameters": len(known), **found}


def renamed(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors by the names that vLLM's class of the model declares for them."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    names = mapper.get_rename_mapper() if mapper else None  # without the fusing of several into one
    return {names.map_name(name) if names else name: tensor for name, tensor in tensors.items()}


def logs(job: dict[str, Any], llm: Any) -> Any:
    """Log probabilities `[prompts, words - 1, vocabulary]` of every next token, as vLLM gives them."""
    import numpy as np
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    size = json.loads(Path(job["out"], "config.json").read_text())["vocab_size"]
    how = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=size, detokenize=False)
    asked = [{"prompt_token_ids": words} for words in prompts()]
    found = np.full((PROMPTS, WORDS - 1, size), np.nan)
    for i, answer in enumerate(llm.generate(asked, how, use_tqdm=False)):
        for t, row in enumerate(answer.prompt_logprobs[1:]):
            for word, each in row.items():
                found[i, t, word] = each.logprob
    assert np.isfinite(found).all()
    return found


def divergence(plain: str, found: Any) -> float:
    """KL divergence, nats a token, of log probabilities from those of the dequantized model in float32."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(plain).architectures[0])
    how = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, told = kind.from_pretrained(plain, **how)
    assert not [*told["missing_keys"], *told["unexpected_keys"]], told
    with torch.no_grad():
        logits = model.float().eval()(torch.tensor(prompts())).logits.double()
    wanted = logits.log_softmax(-1)[:, :-1].numpy()
    return float((np.exp(wanted) * (wanted - found)).sum(-1).mean())


def rounded(inputs: Any, format: str) -> Any:
    """Inputs of a layer as the format has them: with one AbsMax scale for each token, or as they are."""
    import torch  # pyright: ignore[reportMissingImports]

    if format not in LARGEST:
        return inputs
    scale = inputs.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST[format]
    codes = inputs / scale
    return (codes.to(torch.float8_e4m3fn).float() if "fp8" in format else codes.round()) * scale


def layer_errors(job: dict[str, Any], llm: Any, model: Any, quantized: set[str]) -> dict[str, Any]:
    """Largest relative error of a quantized linear layer, against inputs times dequantized weights."""
    import torch  # pyright: ignore[reportMissingImports]
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.linear import LinearBase  # pyright: ignore[reportMissingImports]

    from benchmarks.servers.places import sources

    plain = {n: x.float() for n, x in renamed(model, stored(job["plain"])).items()}
    made_of = sources(plain, (f"{n}.weight" for n, _ in model.named_modules()))
    errors: dict[str, float] = {}

    def check(name: str, inputs: Any, outputs: Any) -> None:
        members = made_of.get(f"{name}.weight", [])
        if name in errors or not members or not quantized.issuperset(members):
            return
        weight = torch.cat([plain[n] for n in members])
        flat = rounded(inputs[0].float().reshape(-1, inputs[0].shape[-1]), job["format"])
        wanted = flat @ weight.T
        biases = [plain[bias] for n in members if (bias := n.removesuffix("weight") + "bias") in plain]
        wanted = wanted + torch.cat(biases) if biases else wanted
        found = (outputs[0] if isinstance(outputs, tuple) else outputs).float().reshape(wanted.shape)
        errors[name] = float((found - wanted).norm() / wanted.norm())

    hooks = [
        module.register_forward_hook(lambda _, inputs, outputs, name=name: check(name, inputs, outputs))
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
    ]
    how = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    llm.generate([{"prompt_token_ids": prompts()[0]}], how, use_tqdm=False)
    for hook in hooks:
        hook.remove()
    return {"layers": len(errors), "layer_error": max(errors.values(), default=None)}


def quantized_by(model: Any, tensors: dict[str, Any]) -> set[str]:
    """Names, in vLLM, of the weights that a folder stores quantized."""
    names = renamed(model, tensors)
    ends = ("_scale", "_scale_inv")
    return {n.removesuffix(end) for n in names for end in ends if n.endswith(f"weight{end}")}


def attempt(job: dict[str, Any], *, kernels: bool) -> dict[str, Any]:
    """Loads a folder, with kernels or without any, and serves it if it may. What came of it, as a row."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    row: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    try:
        with contextlib.ExitStack() as stack:
            if job["processes"] == 1:
                stack.enter_context(watched(seen, stop=not kernels))
            if not kernels:
                stack.enter_context(without_kernels())
            llm = LLM(
                model=job["out"],
                skip_tokenizer_init=True,
                dtype="bfloat16",
                enforce_eager=True,
                max_model_len=LONGEST,
                max_num_seqs=PROMPTS,
                max_logprobs=-1,
                enable_prefix_caching=False,
                disable_custom_all_reduce=True,
                tensor_parallel_size=job["processes"],
            )
        found = logs(job, llm)
        row["served"] = True
        row["divergence"] = divergence(job["plain"], found)
        if seen:
            quantized = quantized_by(seen["model"], stored(job["out"]))
            row |= layer_errors(job, llm, seen["model"], quantized)
    except Enough:
        pass
    except Exception as error:  # whatever the engine refuses with
        row["refused"] = f"{type(error).__name__}: {error}"
    if seen:
        row |= judged(seen["model"], seen["parameters"], job["out"])
    return row


def row_of(job: dict[str, Any]) -> dict[str, Any]:
    """What came of a job; where vLLM has no kernel for it here, what its loader makes of the folder."""
    row = attempt(job, kernels=True)
    clean_up()
    if "refused" in row and "tensors" not in row and job["processes"] == 1:
        again = attempt(job, kernels=False)
        row |= again | {"refused": row["refused"], "without_kernels": again.get("refused", "")}
        clean_up()
    return {"case": job["case"], "served": False, **row}


def clean_up() -> None:
    """Gives back what an engine holds, also one that failed halfway."""
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

    gc.collect()
    with contextlib.suppress(Exception):
        cleanup_dist_env_and_memory()


def main(path: str) -> None:
    """Carries out the jobs of a file."""
    jobs = json.loads(Path(path).read_text())
    alone = all(job["processes"] == 1 for job in jobs)
    os.environ.update(SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not alone))})
    for job in jobs:
        print(json.dumps(row_of(job)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
