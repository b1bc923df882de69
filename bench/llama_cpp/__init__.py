"""Our plain decoding beside llama.cpp's, on the same weights."""
