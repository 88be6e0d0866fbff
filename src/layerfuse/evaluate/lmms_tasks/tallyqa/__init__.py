"""TallyQA as a task of lmms-eval."""
