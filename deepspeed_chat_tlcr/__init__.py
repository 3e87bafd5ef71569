"""TLCR for DeepSpeed-Chat: what the stages share.

Axes, everywhere: ``B`` sequences, ``T`` token positions of prompt and response, ``A`` action (response) positions,
``V`` vocabulary, ``K`` classes. Masks: 1 = counts.
"""
