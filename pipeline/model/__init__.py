"""Teacher and modular layers as one module of leaves, the draws it is trained with, and its objectives."""

from pipeline.model.compiled import compile_layers
from pipeline.model.draws import Draws, Sampler, pure_assemblies, text_of
from pipeline.model.huggingface import check_lengths, check_losses, load_model
from pipeline.model.leaves import ModularLeaf, TeacherLeaf
from pipeline.model.losses import GlobalCounts, LossTerms, Objectives, granularity_label, task_loss
from pipeline.model.modular import ModularModel, ModularOutputs, Wanted, granularity_of
