"""OCR-VQA as a task of lmms-eval."""
