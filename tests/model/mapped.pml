/* The mapped arena: the sender's gather writes by load and store straight into the receiver's region.
 * One leg, two chunks, one region. The PULL may come late, or again when all is over. Afterwards the
 * receiver uses the region for another request, whose data nobody else may touch.
 *
 * It must hold that the sender never writes into a region that the receiver regards as free or has
 * given to somebody else, and that the region is free in the end.
 *
 * LINK         the link may end once, with all that was on its way: the sender forgets the pull, the
 *              receiver fails and keeps what it had granted; on a later link between the same daemons it
 *              tells its END again
 *
 * V_NOTOMB     the sender forgets an ended pull at once, so that a late PULL or CREDIT revives it
 * V_NOWAIT     the receiver frees a granted region on its cancel without waiting for DRAINED
 * V_DRAINEARLY the sender answers DRAINED while a gather runs
 * V_LATERLINK  it does so on a later link, of whose pulls none has one
 * V_LINKFREE   the receiver frees what it had granted when the link ends
 */
#ifndef LINK
#define LINK 0
#endif
byte S; /* 0 none 1 live 2 ended, tombstone 3 gone */
byte R; /* 0 idle 1 pulled 2 completed 3 failed */
bit send; byte cs[3]; byte ncr; byte chk[2]; /* 0 todo 1 gathering(writing) 2 written 3 acked */
byte rch[2]; /* at R: 0 need 1 scattering 2 done */
byte reg; /* 0 FREE 1 GRANTED 2 LANDED 3 SCAT 4 QUAR ; 5 reused by another request */
byte regq; /* current credit of the region */
byte wq[2]; /* credit a chunk is written with */
bit mPULL, mCR[3], mWR[6], mACK[2], mER, mES, mDR, mFIN; /* mWR[c*3+q] */
bit lost, sln, rln, again; /* the link is lost, each side knows, there is a later one */
bit crS, proofS, crR; byte reuse; byte ab; bit drained;
hidden byte i;
#define TELL(b) if :: lost && !again -> skip :: else -> b=1 fi
#define WRITING (chk[0]==1||chk[1]==1)
#define GATHER(c,q) :: d_step{ S==1 && send && chk[c]==0 && cs[q]==1 && (c==0||chk[0]>=2) -> printf("S gathers chunk %d into region (credit %d)\n",c,q); cs[q]=2; chk[c]=1; wq[c]=q; assert(crR || (reg==1 && regq==q) || reg==4) }
#define WRITES(c) :: d_step{ chk[c]==1 && !crS -> printf("gather %d ends\n",c); assert(crR || reg==1 || reg==4); chk[c]=2; if :: S==1 -> TELL(mWR[c*3+wq[c]]) :: else fi }
#define WRITTEN(c,q) :: d_step{ mWR[c*3+q] && R==1 && reg==1 && regq==q && rch[c]==0 -> printf("R gets WRITTEN %d\n",c); reg=2; rch[c]=1 }
#define CREDIT(q) :: d_step{ mCR[q] && cs[q]==0 && S==1 -> printf("S gets CREDIT %d\n",q); cs[q]=1 }
#define ACKIN(c) :: d_step{ mACK[c] && S==1 && chk[c]==2 -> chk[c]=3; if :: chk[0]==3&&chk[1]==3 -> printf("S DELIVERED\n"); S=2 :: else fi }
active proctype M(){
 do
 :: d_step{ !send && S!=2 -> send=1; printf("Send\n") }
 :: d_step{ R==0 && !crR && !proofS -> R=1; TELL(mPULL); printf("PULL\n") }
#ifdef V_NOTOMB
 :: d_step{ mPULL && (S==0||S==2) && !crS && !WRITING && ab<3 -> printf("S gets PULL\n"); ab=ab+(S==2); S=1; chk[0]=0; chk[1]=0; cs[0]=0; cs[1]=0; cs[2]=0 }
#else
 :: d_step{ mPULL && S==0 && !crS -> printf("S gets PULL\n"); S=1 }
#endif
 :: d_step{ R==1 && reg==0 && !proofS && ncr<3 && (rch[0]==0||rch[1]==0) -> printf("R CREDIT %d\n",ncr); reg=1; regq=ncr; TELL(mCR[ncr]); ncr++ }
 CREDIT(0) CREDIT(1) CREDIT(2)
 GATHER(0,0) GATHER(0,1) GATHER(0,2) GATHER(1,0) GATHER(1,1) GATHER(1,2)
 WRITES(0) WRITES(1)
 WRITTEN(0,0) WRITTEN(0,1) WRITTEN(0,2) WRITTEN(1,0) WRITTEN(1,1) WRITTEN(1,2)
 :: d_step{ reg==2 && R==1 -> reg=3 }
 :: d_step{ reg==3 && R==1 -> printf("R scattered\n"); reg=0; if :: rch[0]==1 -> rch[0]=2; TELL(mACK[0]) :: else -> rch[1]=2; TELL(mACK[1]) fi; if :: rch[0]==2&&rch[1]==2 -> R=2; printf("R COMPLETED\n") :: else fi }
 :: d_step{ reg==3 && R==3 -> reg=0 }
 ACKIN(0) ACKIN(1)
 /* R cancel / deadline */
 :: d_step{ R==1 -> printf("R cancel\n"); R=3; TELL(mER);
#ifdef V_NOWAIT
     if :: reg==1 -> reg=0 :: reg==2 -> reg=0 :: else fi
#else
     if :: reg==1 -> reg=4 :: reg==2 -> reg=0 :: else fi
#endif
   }
 :: d_step{ S==1 && !crS -> printf("S cancel\n"); S=2; TELL(mES) }
 :: d_step{ mES && R==1 -> printf("R gets END\n"); R=3; TELL(mER); if :: reg==1 -> reg=4 :: reg==2 -> reg=0 :: else fi }
 :: d_step{ mER && S<=1 && !crS -> printf("S gets END\n"); S=2 }
#ifdef V_DRAINEARLY
 :: d_step{ mER && S==2 && !mDR && !crS -> printf("S DRAINED\n"); TELL(mDR) }
#else
 :: d_step{ mER && S==2 && !mDR && !crS && !WRITING -> printf("S DRAINED\n"); TELL(mDR) }
#endif
 :: d_step{ mDR && reg==4 && R==3 -> printf("R gets DRAINED, region free\n"); reg=0 }
 /* the link ends */
 :: d_step{ LINK && !lost && R>0 && !crS -> lost=1; printf("link lost\n"); mPULL=0; mCR[0]=0; mCR[1]=0; mCR[2]=0; mWR[0]=0; mWR[1]=0; mWR[2]=0; mWR[3]=0; mWR[4]=0; mWR[5]=0; mACK[0]=0; mACK[1]=0; mER=0; mES=0; mDR=0 }
 :: d_step{ lost && !sln && !crS -> sln=1; S=3; printf("S knows\n") }
 :: d_step{ lost && !rln -> rln=1; printf("R knows\n"); if :: R==1 -> R=3 :: else fi;
#ifdef V_LINKFREE
     if :: reg==1 || reg==2 -> reg=0 :: else fi
#else
     if :: reg==1 -> reg=4 :: reg==2 -> reg=0 :: else fi
#endif
   }
 :: d_step{ sln && rln && !again && !crS -> again=1; printf("linked again\n"); if :: reg==4 -> mER=1 :: else fi }
#ifdef V_LATERLINK
 :: d_step{ again && mER && !mDR && !crS -> printf("S DRAINED\n"); mDR=1 }
#else
 :: d_step{ again && mER && !mDR && !crS && !WRITING -> printf("S DRAINED\n"); mDR=1 }
#endif
 :: d_step{ !crS && (S!=3 || sln) && !crR -> crS=1; printf("S daemon killed\n") }
 :: d_step{ crS && !proofS -> proofS=1; chk[0]=(chk[0]==1->0:chk[0]); chk[1]=(chk[1]==1->0:chk[1]); S=3; printf("S proven gone\n"); if :: R==1 -> R=3; if :: reg==1->reg=0 :: reg==2->reg=0 :: else fi :: else fi; if :: reg==4 -> reg=0 :: else fi }
 :: d_step{ reg==0 && R>=2 && reuse==0 -> reuse=1; reg=5; printf("region reused by another request\n") }
 :: d_step{ R==0 && proofS -> R=3; printf("R: no link\n") }
 :: else -> break
 od;
 printf("END S=%d R=%d reg=%d\n",S,R,reg);
 assert(reg==5 || reg==0); assert(R>=2);
 assert(!(S==1))
}
