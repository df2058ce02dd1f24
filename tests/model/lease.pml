/* Leases: OpenSend and Send, CLAIM, DECLINE, PULL and expiry. NS sender ranks and two receiver ranks
 * with a leg between each pair (leg l: sender l/2, receiver l%2). One slice with data, then an empty
 * last one.
 *
 * Messages are bits, so they come in any order (a controller's CLAIM and DECLINE take another link
 * than the rank's PULL), and are lost while a lane is broken and its side has not resynced. A CLAIM
 * whose claimer lives is renewed in time, so the lease cannot expire under it. The graph has no cycle:
 * the last block's assertions are the claim that everything ends.
 *
 * CTRL     CLAIM and DECLINE come from a controller's daemon at any time, also after the rank's PULL
 * DACT     a DECLINE after the PULL ends the leg (else it is ignored)
 * NEVER n  the engines of the last n receivers neither receive nor decline (they may claim)
 * DL       the timers of transfer and wait may fire (without DL nothing may depend on them)
 * LOSS     one lane breaks
 * ABORT n  n cancels
 *
 * V_LEASEPULL    a PULL does not end the lease
 * V_CLAIMFOREVER the transfer's timer begins only with the PULL (it begins with the first activity)
 * V_RELLAST      SOURCE_RELEASED waits for the last slice even when the send has failed
 * V_RELGATHER    SOURCE_RELEASED does not wait for the running gather of an ended leg
 * V_DECLLOST     DECLINE is left out of the resync
 * V_NOPARK       a DECLINE that comes before the Send is forgotten
 * V_LATEPULL     a PULL for an ended send that had never seen it is parked instead of answered
 * V_CLAIMUNDO    a late CLAIM revives the lease of a pulled or declined leg
 */
#ifndef NS
#define NS 1
#endif
#ifndef ABORT
#define ABORT 0
#endif
#ifndef LOSS
#define LOSS 0
#endif
#define NL (NS*2)
#define SN(l) ((l)/2)
#define RN(l) ((l)%2)
byte snd[NS];   /* 0 no Send, 1 open, 2 DELIVERED, 3 FAILED */
bit last[NS], rel[NS], act[NS], undo[NS];
byte lg[NL];    /* 0 waiting 1 pulled 2 gathering 3 gathered 4 acked 5 ended */
bit gat[NL], seen[NL], clm[NL], dcl[NL], rc[NL], rl[NL];
byte R[2];      /* 0 idle 2 pulled 3 COMPLETED 4 FAILED 5 declined */
bit live[2], claimed[2], dd[2];
bit mP[NL], mC[NL], mD[NL], mER[NL], mES[NL], mDT[NL], mL[NL], mA[NL];
bit brk, rsS, rsR, expd, dl, badexp; byte aborts;
hidden byte i, j, k;
inline relCheck(s){ if :: (!rel[s] && snd[s]>=1 &&
#ifdef V_RELGATHER
   1
#else
   !gat[(s)*2] && !gat[(s)*2+1]
#endif
   && (
#ifndef V_RELLAST
   snd[s]>=2 ||
#endif
   (last[s] && lg[(s)*2]>=3 && lg[(s)*2+1]>=3))) -> rel[s]=1; printf("S%d SOURCE_RELEASED\n",s) :: else fi }
inline failS(s){ snd[s]=3; printf("S%d FAILED\n",s); for (i : 0 .. 1) { j=(s)*2+i; if :: lg[j]!=4 -> lg[j]=5 :: else fi; if :: seen[j] -> mES[j]=1 :: else fi }; relCheck(s) }
inline failR(r){ R[r]=4; live[r]=0; printf("R%d FAILED\n",r); for (i : 0 .. NS-1) { mER[i*2+(r)]=1 }; i=0 }
inline doneR(r){ k=1; for (i : 0 .. NS-1) { if :: !rc[i*2+(r)] || !rl[i*2+(r)] -> k=0 :: else fi }; if :: k -> R[r]=3; printf("R%d COMPLETED\n",r) :: else fi }
inline slices(l){ if :: last[SN(l)] -> mL[l]=1 :: else fi }
#define HOLD(s,r) (clm[(s)*2+(r)] && live[r])
#define PULLED(s) (seen[(s)*2] || seen[(s)*2+1])
#define SND_(s) \
 :: d_step{ snd[s]==0 -> printf("S%d Send\n",s); snd[s]=1; if :: dcl[(s)*2]||dcl[(s)*2+1] -> failS(s) :: else -> for (i : 0 .. 1) { if :: seen[(s)*2+i] -> lg[(s)*2+i]=1; act[s]=1 :: else fi; if :: clm[(s)*2+i] -> act[s]=1 :: else fi }; i=0 fi; i=0 } \
 :: d_step{ snd[s]==1 && !last[s] -> printf("S%d Send(last)\n",s); last[s]=1; for (i : 0 .. 1) { if :: lg[(s)*2+i]>=1 && lg[(s)*2+i]<=3 -> mL[(s)*2+i]=1 :: else fi }; relCheck(s) } \
 :: d_step{ snd[s]==1 && LEASE(s) && !HOLD(s,0) && !HOLD(s,1) -> printf("S%d lease expires\n",s); if :: PULLED(s) -> badexp=1 :: else fi; expd=1; failS(s) } \
 DLS(s) ABS(s)
#ifdef V_LEASEPULL
#define LEASE(s) 1
#else
#ifdef V_CLAIMUNDO
#define LEASE(s) (!PULLED(s) || undo[s])
#else
#define LEASE(s) (!PULLED(s))
#endif
#endif
#ifdef DL
#define DLS(s) :: d_step{ snd[s]==1 && act[s] -> printf("S%d deadline\n",s); dl=1; failS(s) }
#define DLR(r) :: d_step{ R[r]==2 -> printf("R%d deadline\n",r); dl=1; failR(r) }
#else
#define DLS(s)
#define DLR(r)
#endif
#define ABS(s) :: d_step{ aborts<ABORT && snd[s]==1 -> printf("S%d cancel\n",s); aborts++; failS(s) }
#define LEG(l) \
 :: d_step{ mP[l] && !seen[l] && snd[SN(l)]<=1 -> printf("S%d gets PULL of %d\n",SN(l),RN(l)); seen[l]=1; if :: snd[SN(l)]==1 -> lg[l]=1; act[SN(l)]=1; slices(l) :: else fi } \
 LATE(l) \
 :: d_step{ mC[l] && snd[SN(l)]<=1 && !clm[l] -> printf("S%d gets CLAIM of %d\n",SN(l),RN(l)); clm[l]=1; CLA(l); UNDO(l) } \
 :: d_step{ mD[l] && !dcl[l] && snd[SN(l)]==0 -> PARK(l) } \
 :: d_step{ mD[l] && !dcl[l] && snd[SN(l)]==1 -> printf("S%d gets DECLINE of %d\n",SN(l),RN(l)); dcl[l]=1; if :: DECL(l) -> failS(SN(l)) :: else fi } \
 :: d_step{ mER[l] && snd[SN(l)]==1 && lg[l]!=4 -> printf("S%d gets END of %d\n",SN(l),RN(l)); failS(SN(l)) } \
 :: d_step{ mER[l] && snd[SN(l)]==0 && !dcl[l] -> printf("S%d gets END of %d before its Send\n",SN(l),RN(l)); dcl[l]=1 } \
 :: d_step{ snd[SN(l)]==1 && lg[l]==1 -> printf("S%d gathers for %d\n",SN(l),RN(l)); assert(!rel[SN(l)]); lg[l]=2; gat[l]=1 } \
 :: d_step{ gat[l] -> printf("S%d gathered for %d\n",SN(l),RN(l)); assert(!rel[SN(l)]); gat[l]=0; if :: lg[l]==2 -> lg[l]=3; mDT[l]=1 :: else fi; relCheck(SN(l)) } \
 :: d_step{ mDT[l] && R[RN(l)]==2 && !rc[l] -> rc[l]=1; mA[l]=rl[l]; doneR(RN(l)) } \
 :: d_step{ mL[l] && R[RN(l)]==2 && !rl[l] -> rl[l]=1; mA[l]=rc[l]; doneR(RN(l)) } \
 :: d_step{ mA[l] && lg[l]==3 -> lg[l]=4; assert(last[SN(l)]); if :: lg[SN(l)*2]==4 && lg[SN(l)*2+1]==4 -> snd[SN(l)]=2; printf("S%d DELIVERED\n",SN(l)) :: else fi } \
 :: d_step{ mES[l] && R[RN(l)]==2 -> printf("R%d gets END of S%d\n",RN(l),SN(l)); failR(RN(l)) } \
 :: d_step{ LOSS && brk && !rsR && mP[l] -> mP[l]=0; printf("PULL %d lost\n",l) } \
 :: d_step{ LOSS && brk && !rsR && mD[l] -> mD[l]=0; printf("DECLINE %d lost\n",l) } \
 :: d_step{ LOSS && brk && !rsR && mER[l] -> mER[l]=0; printf("END of R %d lost\n",l) } \
 :: d_step{ LOSS && brk && !rsR && mA[l] -> mA[l]=0 } \
 :: d_step{ LOSS && brk && !rsS && mES[l] -> mES[l]=0; printf("END of S %d lost\n",l) } \
 :: d_step{ LOSS && brk && !rsS && mL[l] -> mL[l]=0 }
#ifdef V_LATEPULL
#define LATE(l)
#else
#define LATE(l) :: d_step{ mP[l] && !seen[l] && snd[SN(l)]>=2 -> printf("S%d answers PULL of %d with END\n",SN(l),RN(l)); seen[l]=1; mES[l]=1 }
#endif
#ifdef V_NOPARK
#define PARK(l) mD[l]=0; printf("DECLINE %d before the Send: forgotten\n",l)
#else
#define PARK(l) dcl[l]=1; printf("DECLINE %d before the Send\n",l)
#endif
#ifdef V_CLAIMFOREVER
#define CLA(l) skip
#else
#define CLA(l) if :: snd[SN(l)]==1 -> act[SN(l)]=1 :: else fi
#endif
#ifdef V_CLAIMUNDO
#define UNDO(l) if :: seen[l] -> undo[SN(l)]=1 :: else fi
#else
#define UNDO(l) skip
#endif
#ifdef DACT
#define DECL(l) 1
#else
#define DECL(l) (!seen[l])
#endif
#ifdef CTRL
#define MAYDECL(r) (R[r]==0 || R[r]==2)
#define DECLR(r) skip
#else
#define MAYDECL(r) (R[r]==0)
#define DECLR(r) R[r]=5
#endif
#ifndef NEVER
#define NEVER 0
#endif
#define ENG(r) ((r)<2-NEVER)
#define RCV(r) \
 :: d_step{ R[r]==0 && !claimed[r] && !dd[r] -> printf("R%d Claim\n",r); claimed[r]=1; live[r]=1; for (i : 0 .. NS-1) { mC[i*2+r]=1 }; i=0 } \
 :: d_step{ ENG(r) && MAYDECL(r) && !dd[r] -> printf("R%d Decline\n",r); dd[r]=1; live[r]=0; for (i : 0 .. NS-1) { mD[i*2+r]=1 }; DECLR(r) } \
 :: d_step{ ENG(r) && R[r]==0 -> printf("R%d Receive\n",r); R[r]=2; live[r]=0; for (i : 0 .. NS-1) { mP[i*2+r]=1 }; i=0 } \
 :: d_step{ aborts<ABORT && R[r]==2 -> printf("R%d cancel\n",r); aborts++; failR(r) } \
 DLR(r)
active proctype M(){
 do
 SND_(0)
 LEG(0) LEG(1)
#if NS==2
 SND_(1)
 LEG(2) LEG(3)
#endif
 RCV(0) RCV(1)
 :: d_step{ LOSS && !brk -> brk=1; printf("lane breaks\n") }
 :: d_step{ brk && !rsR -> rsR=1; printf("R resync\n"); for (i : 0 .. NL-1) { if :: R[RN(i)]>=2 && R[RN(i)]!=5 -> mP[i]=1 :: else fi; if :: R[RN(i)]==4 -> mER[i]=1 :: else fi; if :: rc[i] && rl[i] -> mA[i]=1 :: else fi;
#ifndef V_DECLLOST
   if :: dd[RN(i)] && !dcl[i] -> mD[i]=1 :: else fi
#endif
   }; i=0 }
 :: d_step{ brk && !rsS -> rsS=1; printf("S resync\n"); for (i : 0 .. NL-1) { if :: seen[i] && snd[SN(i)]==3 -> mES[i]=1 :: seen[i] && last[SN(i)] && snd[SN(i)]==1 -> mL[i]=1 :: else fi }; i=0 }
 :: else -> break
 od;
 skip; d_step { printf("END S=%d rel=%d R=%d,%d\n",snd[0],rel[0],R[0],R[1]);
 for (i : 0 .. NS-1) { assert(snd[i]>=2); assert(rel[i]); assert(!gat[i*2] && !gat[i*2+1]); if :: snd[i]==2 -> assert(rc[i*2] && rc[i*2+1]) :: else fi };
 assert((R[0]>=3 || !ENG(0)) && (R[1]>=3 || !ENG(1)));
 assert(!badexp);
 if :: !expd && !dl && aborts==0 && !dd[0] && !dd[1] -> assert(R[0]==3 && R[1]==3 && snd[0]==2 && snd[NS-1]==2) :: else fi; i=0 }
}
