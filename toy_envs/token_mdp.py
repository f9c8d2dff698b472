import torch
def letters_log_prob(logits, T, A, memory):
    log_pi = logits.log_softmax(-1)
    logp = log_pi.new_zeros(len(logits), 1)
    first = 0
    for t in range(T):
        size = A ** min(t, memory)
        table = log_pi[:, first:first + size]
        logp = (logp.view(len(logits), -1, size, 1) + table[:, None]).reshape(len(logits), -1)
        first += size
    return logp
def demo(patterns, w, slip, A):
    K,T=len(patterns),len(patterns[0])
    step=torch.full((K,T,A), slip/(A-1),dtype=torch.float64)
    for k,p in enumerate(patterns):
        for t,c in enumerate(p): step[k,t,'abcd'.index(c)]=1-slip
    styles=letters_log_prob(step.log(),T,A,0)
    return torch.logsumexp(styles+torch.tensor(w,dtype=torch.float64).log()[:,None],0)
