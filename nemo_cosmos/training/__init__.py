"""Training in NeMo 2's style: `pretrain`, `finetune`, `validate` over a model, data, trainer, log, optim and resume."""
