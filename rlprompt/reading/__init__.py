"""Reading what others wrote: files, JSON, YAML and tensors that may be damaged, huge or hostile.

Nothing here blocks, runs code or takes more memory than its limits allow, and what is refused is
refused with a reason. Callers turn reasons into the sentence that names their file.
"""
