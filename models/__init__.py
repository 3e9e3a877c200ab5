"""Models as files, and models other than GPT-2.

1. checkpoint.py   a model on disk, in and out, whoever wrote it
   sources.py      which checkpoint a name means
2. huggingface.py  what transformers wrote, GPT-2 among it
3. olmo.py         OLMo with the same gates; olmo_files.py: its files on Hugging Face
4. lora.py         adapters, for models too large to train whole
5. export.py       to transformers, TransformerLens and nanoGPT

Imports gate, model and storage/.
"""
