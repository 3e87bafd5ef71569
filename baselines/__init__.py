"""The methods that TLCR is compared with and that need a program of their own: DPO and FIGA."""
