/* Revoke and a change of lanes on a mapped arena, which the sender writes by load and store. Slice 0
 * has chunk 0; then either an empty last slice follows (FIN), or a Revoke and slice 1 (the last) with
 * chunk 1, which brings the same cell anew. One region, which another request uses in the end.
 *
 * The control lane c0 from sender to receiver may break once; the sender then resyncs on c1, and the
 * receiver may go on reading c0 until it has noticed too. Control from receiver to sender is bits, in
 * any order, lost on the break until the receiver's resync. The graph has no cycle: the last block's
 * assertions are the claim that everything ends.
 *
 * It must hold that the sender writes only where its credit is live or the region is quarantined, that
 * what is scattered is the chunk that WRITTEN named, and that both sides end and the region is free.
 * (That a scatter waits for one of a dropped slice is drop.pml's.)
 *
 * BREAK        c0 may break
 * ABORT n      n cancels
 *
 * RETURN       what a Revoke leaves without a chunk may be given back as WRITTEN of the dropped slice: a
 *              credit in hand at once, that of a running gather when it ends
 *
 * V_REUSE      a Revoke makes the credit of a written chunk usable again (only one of a gather is)
 * V_NOREPEAT   the resync repeats WRITTEN of chunks that count only (the receiver then keeps the region)
 * V_DROPKEEP   WRITTEN of a dropped slice leaves its credit live (it spends it)
 * V_GATHERDROP a gather of a dropped chunk is told as WRITTEN, and its credit usable again
 * V_DRAINEARLY DRAINED is answered while a gather runs
 */
#ifndef BREAK
#define BREAK 0
#endif
#ifndef ABORT
#define ABORT 0
#endif
#ifndef RETURN
#define RETURN 0
#endif
#define NQ 4
#define FREE 0
#define GRANTED 1
#define LANDED 2
#define SCAT 3
#define QUAR 4
#define OTHER 5
#define mSLICE0 1
#define mFIN 2
#define mDROP 3
#define mSLICE1 4
#define mEND 5
#define mDRAINED 6
#define mWR 10 /* + 4 * chunk + credit */
byte S=1, R=1; bit said0, fin, rev, seenER;
byte chk[2]; /* 0 todo 1 gathering 2 written 3 acked */
byte wq[2], cs[NQ]; /* credit: 0 unknown 1 in hand 2 used */
byte rsl0, rch[2]; bit rsl1, rfin; /* slice 0: 0 unknown 1 known 2 dropped; chunk: 0 needed 1 here 2 done */
byte reg, regq, rc, nq, data; /* data: chunk + 1 whose bytes lie in the region */
bit zombie; /* the scatter that runs is of the dropped slice */
bit mCR[NQ], mA[2], mER, brk, sdn, rdn, drained; byte aborts;
chan c0=[6] of {byte}; chan c1=[8] of {byte};
hidden byte m, q;
#define WRITING (chk[0]==1||chk[1]==1)
#define SEND(x) if :: !sdn -> if :: !brk -> c0!x :: else fi :: else -> c1!x fi
#define TELL(b) if :: brk && !rdn -> skip :: else -> b=1 fi
#define COUNTS(c) ((c)==1 || !rev)
#ifdef V_DRAINEARLY
#define MAYDRAIN (seenER && S==2)
#else
#define MAYDRAIN (seenER && S==2 && !WRITING)
#endif
inline rfail(){ R=3; TELL(mER); if :: reg==GRANTED -> reg=QUAR :: reg==LANDED -> reg=FREE :: else fi }
inline rdone(){ if :: R==1 && ((rfin && rsl0==1 && rch[0]==2) || (rsl1 && rch[1]==2)) -> R=2; printf("R COMPLETED\n"); TELL(mER) :: else fi }
inline written(c, w){
 if
 :: R!=1 -> TELL(mER)
 :: R==1 && !(reg==GRANTED && regq==w) -> if :: rch[c]==2 || (c==0 && rsl0==2) -> TELL(mA[c]) :: else fi
 :: R==1 && reg==GRANTED && regq==w && c==0 && rsl0==2 ->
#ifdef V_DROPKEEP
   TELL(mA[0])
#else
   reg=FREE; TELL(mA[0])
#endif
 :: R==1 && reg==GRANTED && regq==w && !(c==0 && rsl0==2) -> assert(rch[c]==0); reg=LANDED; rc=c; rch[c]=1; printf("R lands chunk %d\n",c)
 fi
}
inline receive(x){
 if
 :: x==mSLICE0 -> if :: rsl0==0 -> rsl0=1 :: else fi
 :: x==mFIN -> rfin=1; rdone()
 :: x==mDROP -> printf("R gets DROP\n"); rsl0=2; if :: R==1 && reg==LANDED && rc==0 -> reg=FREE; TELL(mA[0]) :: R==1 && reg==SCAT && rc==0 -> zombie=1 :: else fi
 :: x==mSLICE1 -> rsl1=1
 :: x==mEND -> if :: R==1 -> printf("R gets END\n"); rfail() :: else fi
 :: x==mDRAINED -> drained=1; if :: reg==QUAR -> reg=FREE; printf("R gets DRAINED\n") :: else fi
 :: x>=mWR -> written((x-mWR)/4, (x-mWR)%4)
 fi
}
#ifdef V_NOREPEAT
#define REPEATS(c) (chk[c]==2 && COUNTS(c))
#else
#define REPEATS(c) (chk[c]==2)
#endif
inline repeat(c){ if :: REPEATS(c) -> c1!(mWR+4*(c)+wq[c]) :: else fi }
#define GATHER(c,w) :: d_step{ S==1 && said0 && (c==0 || rev) && COUNTS(c) && chk[c]==0 && cs[w]==1 && !WRITING -> printf("S gathers chunk %d, credit %d\n",c,w); cs[w]=2; chk[c]=1; wq[c]=w; data=0; assert((reg==GRANTED && regq==w) || reg==QUAR) }
#ifdef V_GATHERDROP
#define ENDS(c) :: d_step{ chk[c]==1 -> assert((reg==GRANTED && regq==wq[c]) || reg==QUAR); data=c+1; chk[c]=2; if :: !COUNTS(c) -> cs[wq[c]]=1 :: else fi; if :: S==1 -> SEND(mWR+4*c+wq[c]) :: S==2 && MAYDRAIN -> SEND(mDRAINED) :: else fi }
#else
#define ENDS(c) :: d_step{ chk[c]==1 -> printf("gather %d ends\n",c); assert((reg==GRANTED && regq==wq[c]) || reg==QUAR); data=c+1; if :: COUNTS(c) -> chk[c]=2; if :: S==1 -> SEND(mWR+4*c+wq[c]) :: else fi :: else -> chk[c]=3; cs[wq[c]]=1 fi; if :: MAYDRAIN -> SEND(mDRAINED) :: else fi } \
 :: d_step{ RETURN && S==1 && chk[c]==1 && !COUNTS(c) -> printf("gather %d ends, credit %d goes back\n",c,wq[c]); assert((reg==GRANTED && regq==wq[c]) || reg==QUAR); data=c+1; chk[c]=2; SEND(mWR+4*c+wq[c]) }
#endif
#define GIVEBACK(w) :: d_step{ RETURN && S==1 && rev && chk[0]==0 && cs[w]==1 -> printf("S gives credit %d back\n",w); cs[w]=2; chk[0]=2; wq[0]=w; SEND(mWR+w) }
#define CREDIT(w) :: d_step{ mCR[w] && cs[w]==0 && S==1 -> cs[w]=1; printf("S gets credit %d\n",w) }
active proctype M(){
 do
 :: d_step{ S==1 && !said0 -> said0=1; SEND(mSLICE0) }
 :: d_step{ S==1 && said0 && !fin && !rev -> fin=1; SEND(mFIN) }
 :: d_step{ S==1 && said0 && !fin && !rev -> printf("Revoke\n"); rev=1;
#ifdef V_REUSE
     if :: chk[0]==2 -> cs[wq[0]]=1 :: else fi;
#endif
     SEND(mDROP); SEND(mSLICE1) }
 GIVEBACK(0) GIVEBACK(1) GIVEBACK(2) GIVEBACK(3)
 GATHER(0,0) GATHER(0,1) GATHER(0,2) GATHER(0,3) GATHER(1,0) GATHER(1,1) GATHER(1,2) GATHER(1,3)
 ENDS(0) ENDS(1)
 CREDIT(0) CREDIT(1) CREDIT(2) CREDIT(3)
 :: d_step{ mA[0] && chk[0]==2 -> chk[0]=3; if :: S==1 && !rev && fin -> S=2; printf("S DELIVERED\n"); SEND(mEND) :: else fi }
 :: d_step{ S==1 && !rev && fin && chk[0]==3 -> S=2; SEND(mEND) }
 :: d_step{ mA[1] && chk[1]==2 -> chk[1]=3; if :: S==1 -> S=2; printf("S DELIVERED\n"); SEND(mEND) :: else fi }
 :: d_step{ mER && !seenER -> seenER=1; printf("S gets END\n"); S=2; if :: MAYDRAIN -> SEND(mDRAINED) :: else fi }
 :: d_step{ S==1 && aborts<ABORT -> aborts++; printf("S cancel\n"); S=2; SEND(mEND) }
 :: d_step{ R==1 && aborts<ABORT -> aborts++; printf("R cancel\n"); rfail() }
 /* the receiver grants after a SLICE only */
 :: d_step{ R==1 && reg==FREE && nq<NQ && ((rsl0==1 && rch[0]==0) || (rsl1 && rch[1]==0)) -> reg=GRANTED; regq=nq; nq++; TELL(mCR[regq]) }
 :: d_step{ reg==LANDED && R==1 -> reg=SCAT; assert(data==rc+1) }
 :: d_step{ reg==SCAT -> assert(data==rc+1); reg=FREE; if :: zombie -> zombie=0; TELL(mA[0]) :: else -> if :: R==1 -> rch[rc]=2; TELL(mA[rc]); rdone() :: else fi fi }
 :: d_step{ !rdn && nempty(c0) -> c0?m; receive(m) }
 :: d_step{ sdn && nempty(c1) -> c1?m; receive(m) }
 :: d_step{ BREAK && !brk -> brk=1; printf("c0 breaks\n"); mA[0]=0; mA[1]=0; mER=0; mCR[0]=0; mCR[1]=0; mCR[2]=0; mCR[3]=0 }
 :: d_step{ brk && !sdn -> sdn=1; printf("S resyncs\n");
     if :: rev -> c1!mDROP; c1!mSLICE1 :: !rev && said0 -> c1!mSLICE0; if :: fin -> c1!mFIN :: else fi :: else fi;
     if :: S==1 -> repeat(0); repeat(1) :: else -> c1!mEND fi;
     if :: MAYDRAIN -> c1!mDRAINED :: else fi }
 :: d_step{ brk && !rdn -> rdn=1; printf("R resyncs\n"); if :: R==1 && reg==GRANTED -> mCR[regq]=1 :: else fi; if :: rch[0]==2 || rsl0==2 -> mA[0]=1 :: else fi; if :: rch[1]==2 -> mA[1]=1 :: else fi; if :: R>=2 && !drained -> mER=1 :: else fi }
 :: d_step{ reg==FREE && R>=2 -> reg=OTHER; data=0; printf("another request has the region\n") }
 :: else -> break
 od;
 printf("END S=%d R=%d reg=%d\n",S,R,reg);
 d_step{ assert(reg==OTHER); assert(R>=2); assert(S==2); assert(ABORT || R==2) }
}
