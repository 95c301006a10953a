"""The adapters of a server: found under a root, read, proven, held in memory, and given places in the
bank.
"""
