"""The loss between hidden states of the student and of the teacher."""
