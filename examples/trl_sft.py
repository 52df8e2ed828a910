"""Supervised finetuning with TRL's SFTTrainer in FP8, resumed from a checkpoint.

python examples/trl_sft.py [--recipe coat] [--steps 40] [--resume FOLDER/checkpoint-20]

A tiny model and a tokenizer of its words are made here, so that nothing is downloaded; of yours,
load both by from_pretrained.
"""

import argparse

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

import quaver as qv

WORDS = [str(n) for n in range(60)]


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    )


def tiny_model(tokenizer) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def walks(count: int, seed: int) -> Dataset:
    """Texts that count on by 1, 2 or 3: the loss of who has learned it is log 3 = 1.10."""
    steps = torch.randint(1, 4, (count, 16), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_list(
        [{"text": " ".join(map(str, row))} for row in steps.cumsum(1).tolist()]
    )


def main(
    recipe: str | None = "coat",
    steps: int = 40,
    folder: str = "runs/sft",
    resume: str | None = None,
    ours: bool = True,
) -> tuple[float, torch.nn.Module]:
    """Trains in f32 where `recipe` is None, and by TRL's default optimizer unless `ours`; returns
    the held-out loss and the model."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    optimizer = None
    if recipe is not None:
        qv.convert(model, recipe)
        if ours:
            options = {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.9, 0.999)}
            optimizer = (qv.AdamW, options | {"recipe": recipe})
    arguments = SFTConfig(
        folder, max_steps=steps, save_steps=steps // 2, per_device_train_batch_size=16,
        learning_rate=3e-3, max_length=32, bf16=recipe is not None, use_cpu=True, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False, logging_steps=steps // 2,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, arguments, train_dataset=walks(16 * steps, seed=1), eval_dataset=walks(64, seed=2),
        processing_class=tokenizer, optimizer_cls_and_kwargs=optimizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    print(f"held-out loss {loss:.6f}")
    return loss, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="coat")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", default="runs/sft")
    parser.add_argument("--resume")
    main(**vars(parser.parse_args()))
