"""Two tasks, one after the other, with Accelerate: `accelerate launch examples/accelerate_loop.py [CLIP folder or hub name]`."""

import sys

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPProcessor

from keeplora import ContinualLearner, KeepLoraConfig

torch.manual_seed(0)
name = sys.argv[1] if len(sys.argv) > 1 else "openai/clip-vit-base-patch32"
accelerator = Accelerator()
model, processor = CLIPModel.from_pretrained(name).to(accelerator.device), CLIPProcessor.from_pretrained(name)

# Two tasks of generated 64 × 64 pictures: class names, and how much red, green and blue each is painted with.
tasks = {
    "colours": {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)},
    "mixtures": {"yellow": (1, 1, 0), "cyan": (0, 1, 1), "magenta": (1, 0, 1)},
}


def paint(colour):
    return (40 + 130 * torch.tensor(colour)[:, None, None] + 25 * torch.randn(3, 64, 64)).clamp(0, 255).byte()


def make_loader(classes):
    samples = [(paint(colour), label) for label, colour in enumerate(classes.values()) for _ in range(24)]
    prompts = processor(text=[f"a picture that is {c}" for c in classes], return_tensors="pt", padding=True)

    def collate(items):
        pixels = processor(images=[picture for picture, _ in items], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in items]), **prompts}

    return DataLoader(samples, batch_size=12, shuffle=True, collate_fn=collate)


def logits(model, batch):
    return model(**{key: batch[key].to(accelerator.device) for key in batch if key != "labels"}).logits_per_image


def loss_fn(model, batch):
    return cross_entropy(logits(model, batch), batch["labels"].to(accelerator.device))


@torch.no_grad()
def accuracy(loader):
    hits = [logits(model.eval(), batch).argmax(dim=1).cpu() == batch["labels"] for batch in loader]
    return 100 * torch.cat(hits).float().mean().item()


train, test = ({task: make_loader(classes) for task, classes in tasks.items()} for _ in range(2))
config = KeepLoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
learner = ContinualLearner(model, config)
for task, loader in train.items():
    before = accuracy(test[task])
    # Leaving the block merges the adapter and protects the task; an exception inside undoes it.
    with learner.task(task, loader, loss_fn) as peft_model:
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=5e-3)
        wrapped, optimizer, batches = accelerator.prepare(peft_model, optimizer, loader)
        for _epoch in range(5):
            for batch in batches:
                optimizer.zero_grad()
                accelerator.backward(loss_fn(wrapped, batch))
                optimizer.step()
    accelerator.print(f"{task}: {before:.0f} % before, {accuracy(test[task]):.0f} % after learning it")
accelerator.print(f"colours: {accuracy(test['colours']):.0f} % after learning mixtures")
