"""Exercise 8: the others' sum is the whole sum less one's own."""


def leave_one_out(rewards):
    others = rewards.sum(1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)
