"""Runs QLoRA with TRL, PEFT and bitsandbytes as their documentation sets them up, for benchmarks.parity.

It uses nothing of common/. Prints one line of JSON: the loss of each step, and the seconds of trainer.train(). With
--fp32-adapters the adapters stay in fp32: TRL casts those of a 4-bit model to bf16, which hides smaller differences.
"""

import argparse
import json
import time

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("rank", "seq-len", "micro-batch-rows", "accumulation", "max-steps", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("alpha", "learning-rate"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--fp32-adapters", action="store_true")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    adapters: dict[str, torch.Tensor] = {}
    if args.fp32_adapters:
        torch.manual_seed(args.seed)
        model = get_peft_model(model, lora)
        adapters = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=args.out,
            max_length=args.seq_len,
            packing=True,
            assistant_only_loss=True,
            per_device_train_batch_size=args.micro_batch_rows,
            gradient_accumulation_steps=args.accumulation,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            max_steps=args.max_steps,
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
        peft_config=None if args.fp32_adapters else lora,
    )
    for name, tensor in adapters.items():
        model.get_parameter(name).data = tensor
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"losses": losses, "seconds": seconds}))


if __name__ == "__main__":
    main()
