"""STEP inside training frameworks."""
