"""Exercise 6: the floor is relative to pi_0's likeliest token, and only the denominator has one."""
import math


def log_ratio_reward(logp_sft, logp_init, tokens, mask, floor):
    logp_init = logp_init.maximum(logp_init.amax(-1, keepdim=True) + math.log(floor))
    ratio = (logp_sft - logp_init).gather(-1, tokens[..., None]).squeeze(-1)
    return (ratio * mask).sum(1)
