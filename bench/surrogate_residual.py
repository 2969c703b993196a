import sys
from bench.surrogate_scan import *
import bdfast, glob
from bdfast.inversion.surrogates import find_surrogates
from bdfast.matrix.shares import drawn
from bdfast.evaluation import Evaluator
from bdfast.attacks import Triggered, METHODS
def scene_of(m,x,y):
    def logits(z):
        with autocast(torch.device('cpu'),True): return m(z).float()
    for q in m.parameters(): q.requires_grad_(False)
    return Scene(logits,x,y,10,(0.,1.),256)
def study(kind,want,share,methods,targets=None):
    for p in sorted(glob.glob('results/networks/*.json')):
        d=p.split('/')[-1][:-5]; f,m=load(d); o=f['attack'].get('options',{})
        if f['seed']!=0 or f['attack']['kind']!=kind or any(o.get(k)!=v for k,v in want.items()): continue
        src=srcs["fashion-mnist" if f['spec']['in_channels']==1 else "fashion-on-photos"]
        pos=drawn(src.train.labels,0,num_classes=10,**share)
        clean=src.train.subset(pos); n=len(pos); perm=torch.randperm(n,generator=torch.Generator().manual_seed(1)); cut=int(.75*n)
        xs,ys=src.train.batch(pos[perm[:cut]]); xh,yh=src.train.batch(pos[perm[cut:]])
        t=time.time(); s=find_surrogates(scene_of(m,xs,ys),torch.Generator().manual_seed(0),targets=targets)
        print(kind,want,n,'lengths',[round(float(v),3) for v in s.lengths.lengths],s.lengths.suspects,f"{time.time()-t:.0f}s")
        ev=Evaluator(src.test,Triggered(src.test,METHODS[kind](**o)) if kind!='none' else None)
        def show(name,mm):
            r=s.rates(scene_of(mm,xh,yh)); e=ev(mm)
            print(f"  {name:22s} ACC {100*e.acc:.1f} ASR {100*(e.asr or 0):.1f}  ", ' '.join(f"{t.target}:{t.label}={v:.2f}" for t,v in zip(s.triggers,r)),flush=True)
        show('before',m)
        for name,opts in methods:
            for q in m.parameters(): q.requires_grad_(True)
            res=bdfast.purify(m,clean,method=name,**opts); show(f"{name} {opts}",res.model)
if __name__=="__main__":
    what=sys.argv[1]
    M=[('ft',{}),('ft_sam',{}),('pam',{}),('tsbd',{})]
    if what=='b3': study('badnets',{'target':3},{'share':.01,'per_class':None},M+[('tsbd',{'n':.1}),('tsbd',{'n':.3}),('pam',{'rho':.15})])
    if what=='bl5': study('blended',{'target':5},{'share':None,'per_class':10},M)
    if what=='sig': study('sig',{'target':4},{'share':.01,'per_class':None},M,targets=[4,6])
    if what=='lf': study('lf',{'target':6},{'share':.01,'per_class':None},M)
