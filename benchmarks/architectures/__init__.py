"""Every language model class of the installed transformers, built tiny and scored."""
