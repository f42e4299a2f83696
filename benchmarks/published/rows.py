"""What others published: the peak memory and the speed of their runs, with their settings and where they stand.

The numbers are copied from the files that `Source` names. Settings that the authors do not state are inferred; each is
marked so here, and docs/published.md says by what.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["full", "lora", "qlora"]


@dataclass(frozen=True)
class Source:
    """A file with measurements, and what they were made with."""

    repository: str  # on GitHub
    file: str
    commit: str  # the version of the file that was read
    date: str  # of the measurement; a month where it is that of the newest package in the authors' requirements
    gpu: str


@dataclass(frozen=True)
class Stack:
    """The authors' software, and what depends on its version."""

    packages: tuple[str, ...]  # pinned as they pinned them; installed without what they depend on
    adapters_fp32: bool = True
    double_quant: bool = True
    dequantizes_to_fp32: bool = False  # quantised from an fp32 weight: bitsandbytes returns to that dtype
    keeps_inputs: bool = False  # bitsandbytes before 0.43.2 keeps the input of each 4-bit matmul (its issue 1270)
    attention: Literal["flash", "masked"] = "flash"  # "masked": torch's memory-efficient kernel with a mask
    reentrant: bool = True
    loss: Literal["cross entropy", "mean of logits"] = "cross entropy"
    trains: bool = True  # with AdamW; else one backward pass alone
    clips: bool = True
    warm_up_tokens: int = 0  # of a forward pass without gradients before the peak is reset


@dataclass(frozen=True)
class Row:
    """One measured run."""

    name: str
    source: Source
    stack: Stack
    model: str  # a key of MODELS
    rows: int  # of a step; gradient accumulation is 1
    tokens: int  # of a row
    method: Method
    autocast: bool = False
    norms_fp32: bool = False  # TRL's preparation of 4-bit models
    rank: int = 16
    targets: tuple[str, ...] | None = ("q_proj", "k_proj", "v_proj", "o_proj")  # None: PEFT's own
    peak_bytes: int | None = None  # torch.cuda.max_memory_allocated
    rest_bytes: int | None = None  # torch.cuda.memory_allocated after training
    tokens_per_s: dict[str, float] = field(default_factory=dict)  # by GPU; of one GPU


# Name: transformers' model_type, and the arguments of its config class; the others are its defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral 7B": (
        "mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
        },
    ),
    "Llama 2 70B": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
        },
    ),
    "PowerLM 3B": (
        "granite",
        {
            "vocab_size": 49152,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 40,
            "num_attention_heads": 36,
            "num_key_value_heads": 36,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "Llama 2 7B": ("llama", {"max_position_embeddings": 4096}),
    "Llama 1B": (
        "llama",
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
}

A100, RTX_4090, RTX_3090 = "NVIDIA A100 80GB", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090"
# Dense bf16 matmul with fp32 sums (FLOP/s) and memory bandwidth (bytes/s), from NVIDIA's data sheets: A100 80GB SXM;
# RTX 4090 (Ada GPU architecture whitepaper, appendix A); RTX 3090 (GA102 whitepaper, table 9).
DATA_SHEETS = {A100: (312e12, 2.039e12), RTX_4090: (165.2e12, 1.008e12), RTX_3090: (71e12, 0.936e12)}

_FMS = "foundation-model-stack/fms-acceleration"
_REFS = "scripts/benchmarks/refs"
FMS_2025 = Source(
    _FMS,
    f"{_REFS}/a100_80gb_update_cross_entropy_and_deps.csv",
    "bfdef09c185b7a836222066d4096d52ec7e1f5da",
    "2025-01",
    A100,
)
FMS_2024 = Source(_FMS, f"{_REFS}/a100_80gb.csv", "0aab2c6f64e3e19d137efe2b8f7a4c65c23a2059", "2024-11", A100)
GRANITE = Source(_FMS, f"{_REFS}/a100_80gb_granite.csv", "426a4a50158dca1eb20ace0f55381829d53088c5", "2024-09", A100)
NOTEBOOK = Source(
    "AnswerDotAI/fsdp_qlora",
    "nbs/00-profile_lora_qlora.ipynb",
    "c21fff0a8fa3336360fdb8480d994da48835fd80",
    "2024-02",
    "a GPU with 16 GB, not named",
)
FSDP_QLORA = Source(
    "AnswerDotAI/fsdp_qlora",
    "benchmarks_03_2024.md",
    "23fafdfb4af403d0808038adafbfd74de265d33a",
    "2024-03",
    "two RTX 4090 or two RTX 3090 (at 280 W), a copy of the model on each",
)

# The versions are those of the requirements beside the results (requirements_update_cross_entropy_and_deps.txt,
# requirements.txt and requirements_granite.txt at the same commits); all with torch 2.4.1 and bitsandbytes 0.43.3.
WITH_4_48 = Stack(
    (
        "transformers==4.48.1",
        "peft==0.13.2",
        "accelerate==1.0.1",
        "tokenizers==0.21.0",
        "huggingface-hub==0.27.1",
    )
)
WITH_4_45_2 = Stack(
    (
        "transformers==4.45.2",
        "peft==0.13.2",
        "accelerate==1.0.1",
        "tokenizers==0.20.3",
        "huggingface-hub==0.26.2",
    )
)
# Inferred: accelerate. They had a commit of its repository, before 1.0.
WITH_4_45_0 = Stack(
    (
        "transformers==4.45.0",
        "peft==0.12.0",
        "accelerate==0.34.2",
        "tokenizers==0.20.0",
        "huggingface-hub==0.25.1",
    )
)
# Inferred: all versions, from the dates; the notebook and the page name none.
_FEBRUARY_2024 = (
    "transformers==4.38.1",
    "peft==0.8.2",
    "accelerate==0.27.2",
    "tokenizers==0.15.2",
    "huggingface-hub==0.21.4",
)
# The notebook makes the model in fp32, quantises it, and moves all else to bf16.
IN_NOTEBOOK = Stack(
    _FEBRUARY_2024,
    adapters_fp32=False,
    double_quant=False,
    dequantizes_to_fp32=True,
    keeps_inputs=True,
    attention="masked",
    reentrant=False,
    loss="mean of logits",
    trains=False,
    warm_up_tokens=512,
)
# train.py of the same repository, with its defaults: reentrant as the page says, no clipping.
IN_TRAIN_PY = Stack(_FEBRUARY_2024, adapters_fp32=False, double_quant=False, keeps_inputs=True, clips=False)


def _fms(
    label: str, source: Source, stack: Stack, model: str, numbers: dict[int, tuple[int, int, float]], **settings: Any
) -> list[Row]:
    """Runs of fms-acceleration with 4 and 8 rows. numbers: by rows, the peak, the rest and tokens a second.

    Inferred: the length of a row, which is tokens a second over samples a second.
    """
    return [
        Row(f"{model} {label} x{rows}, {source.date}", source, stack, model, rows, 4096, peak_bytes=peak,
            rest_bytes=rest, tokens_per_s={source.gpu: speed}, **settings)
        for rows, (peak, rest, speed) in numbers.items()
    ]  # fmt: skip


def _fsdp_qlora(label: str, method: Method, rows: int, seconds: dict[str, int]) -> Row:
    """A run of fsdp_qlora with a copy of the model on each of two cards. seconds: of 1,024 samples of 2,048 tokens."""
    return Row(
        f"Llama 2 7B {label} x{rows}, {FSDP_QLORA.date}",
        FSDP_QLORA,
        IN_TRAIN_PY,
        "Llama 2 7B",
        rows,
        2048,
        method,
        rank=64,
        targets=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"),
        tokens_per_s={gpu: 1024 * 2048 / both / 2 for gpu, both in seconds.items()},
    )


ROWS: tuple[Row, ...] = (
    *(
        Row(f"Llama 1B QLoRA {tokens}", NOTEBOOK, IN_NOTEBOOK, "Llama 1B", 1, tokens, "qlora", rank=8, targets=None,
            peak_bytes=peak)
        for tokens, peak in {512: 1360229376, 1024: 1844102144, 2048: 2791502848}.items()
    ),
    *_fms("LoRA", FMS_2025, WITH_4_48, "Mistral 7B", method="lora", numbers={
        4: (26704571904, 14664493056, 3324.155), 8: (38742912512, 14664886272, 3353.809)}),
    *_fms("QLoRA", FMS_2025, WITH_4_48, "Mistral 7B", method="qlora", autocast=True, numbers={
        4: (16373838336, 4306496512, 3595.714), 8: (28412178944, 4306889728, 3662.639)}),
    *_fms("full", FMS_2025, WITH_4_48, "Mistral 7B", method="full", numbers={
        4: (72434837504, 43467876352, 3062.694), 8: (72435230720, 43468269568, 3143.118)}),
    *_fms("QLoRA", FMS_2025, WITH_4_48, "Llama 2 70B", method="qlora", autocast=True, numbers={
        4: (68126381056, 37179001856, 464.362)}),
    *_fms("LoRA", FMS_2024, WITH_4_45_2, "Mistral 7B", method="lora", numbers={
        4: (25653881344, 14664508928, 3319.225), 8: (36643613184, 14664902144, 3352.459)}),
    *_fms("QLoRA, norms in fp32", FMS_2024, WITH_4_45_2, "Mistral 7B", method="qlora", autocast=True, norms_fp32=True,
        numbers={4: (20556796416, 4307044864, 2841.619), 8: (36801860096, 4307438080, 2929.82)}),
    *_fms("QLoRA", FMS_2024, WITH_4_45_2, "Mistral 7B", method="qlora", autocast=True, numbers={
        4: (15323147776, 4306512384, 3544.048), 8: (26312879616, 4306905600, 3615.84)}),
    *_fms("full", FMS_2024, WITH_4_45_2, "Mistral 7B", method="full", numbers={
        4: (72434853376, 43467892224, 3013.697), 8: (72435246592, 43468285440, 3090.877)}),
    *_fms("QLoRA", FMS_2024, WITH_4_45_2, "Llama 2 70B", method="qlora", autocast=True, numbers={
        4: (68126422016, 37179042816, 466.067)}),
    *_fms("LoRA", GRANITE, WITH_4_45_0, "PowerLM 3B", method="lora", autocast=True, numbers={
        4: (20193463808, 7183026688, 5269.56), 8: (33176473088, 7183419904, 5354.642)}),
    *_fms("QLoRA, norms in fp32", GRANITE, WITH_4_45_0, "PowerLM 3B", method="qlora", autocast=True, norms_fp32=True,
        numbers={4: (18174161920, 2143825920, 4187.137), 8: (34177070080, 2144219136, 4309.481)}),
    *_fms("QLoRA", GRANITE, WITH_4_45_0, "PowerLM 3B", method="qlora", autocast=True, numbers={
        4: (15151677952, 2141240832, 5522.998), 8: (28134687232, 2141634048, 5656.894)}),
    _fsdp_qlora("QLoRA", "qlora", 8, {RTX_4090: 450, RTX_3090: 875}),
    _fsdp_qlora("LoRA", "lora", 4, {RTX_4090: 437, RTX_3090: 881}),
)  # fmt: skip
