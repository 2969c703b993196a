import json,glob,sys,time,torch
torch.set_num_threads(1)
from bdfast.inversion.scene import Scene
from bdfast.inversion.least_length import least_lengths
from bdfast.data.sources import load_source
from bdfast.matrix.shares import order
from bdfast.io import load_into
from bdfast.models import ModelSpec
from bdfast.training.precision import autocast
srcs={n:load_source(n) for n in ("fashion-mnist","fashion-on-photos")}
def load(d):
    f=json.load(open(f"results/networks/{d}.json"))
    sp={k:tuple(v) if isinstance(v,list) else v for k,v in f['spec'].items()}
    m=ModelSpec(**sp).build(); load_into(m,f"results/networks/{d}.safetensors"); return f,m.eval().to(memory_format=torch.channels_last)
tune={('badnets',0),('badnets',3),('blended',2),('blended',5),('sig',4),('lf',6),('blended',8),('badnets',1),('badnets',6),('blended',3),('bpp',9)}
if __name__=="__main__":
  for p in sorted(glob.glob('results/networks/*.json')):
    d=p.split('/')[-1][:-5]; f,m=load(d)
    o=f['attack'].get('options',{}); kind=f['attack']['kind']
    if f['seed']!=0 or not (kind=='none' or (kind,o.get('target')) in tune or o.get('targets')): continue
    src=srcs["fashion-mnist" if f['spec']['in_channels']==1 else "fashion-on-photos"]
    aside=order(len(src.train),0)[1][:int(sys.argv[1])]
    x,y=src.train.batch(aside)
    def logits(z):
        with autocast(torch.device('cpu'),True): return m(z).float()
    for q in m.parameters(): q.requires_grad_(False)
    t=time.time()
    r=least_lengths(Scene(logits,x,y,10,(0.,1.),256),torch.Generator().manual_seed(0))
    print(kind,o.get('target'),'a2a' if o.get('targets') else '',f['spec']['arch'],f['spec']['in_channels'],[round(float(v),3) for v in r.lengths],r.suspects,f"{time.time()-t:.0f}s",flush=True)
