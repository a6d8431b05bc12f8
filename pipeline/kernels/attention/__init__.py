"""The loss between attention maps of the student and of the teacher."""
