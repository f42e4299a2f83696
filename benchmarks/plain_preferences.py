"""Runs TRL's DPOTrainer or KTOTrainer with PEFT and bitsandbytes, for benchmarks.preference_parity.

It uses nothing of common/. Examples are trained in the order of the file, a batch an optimizer step. Prints one line of
JSON: the loss of each step, the seconds of trainer.train(), and those before it in which the reference is computed. The
adapters stay in fp32: TRL casts those of a 4-bit model to bf16, which hides smaller differences.
"""

import argparse
import json
import time
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss", choices=("dpo", "kto"), required=True)
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("rank", "batch", "max-steps", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("alpha", "beta", "learning-rate"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--precompute", action="store_true", help="the reference before the run and not in each step")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    torch.manual_seed(args.seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=args.alpha, target_modules="all-linear")
    model = get_peft_model(model, lora)
    adapters = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    kind, config = (DPOTrainer, DPOConfig) if args.loss == "dpo" else (KTOTrainer, KTOConfig)
    started = time.perf_counter()
    trainer = kind(
        model,
        args=config(
            output_dir=args.out,
            beta=args.beta,
            precompute_ref_log_probs=args.precompute,
            max_length=None,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            max_steps=args.max_steps,
            train_sampling_strategy="sequential",
            optim="adamw_torch_fused",
            bf16=gpu,
            use_cpu=not gpu,
            seed=args.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    for name, tensor in adapters.items():
        model.get_parameter(name).data = tensor
    ready = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - ready
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    before = ready - started if args.precompute else 0.0  # tokenising included
    print(json.dumps({"losses": losses, "seconds": seconds, "reference_seconds": before}))


if __name__ == "__main__":
    main()
