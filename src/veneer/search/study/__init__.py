"""`veneer study`: learning against forgetting, claim by claim, by comparisons fixed beforehand."""
