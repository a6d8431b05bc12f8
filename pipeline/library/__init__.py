"""The product of training: the module library, made from a checkpoint, checked, and switched between sizes."""

from pipeline.library.command import checkpoint_command
from pipeline.library.export import check_library, export_library, product_of
from pipeline.library.switching import ModuleLibrary
