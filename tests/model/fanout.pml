/* Several receivers of one send: NS sender ranks, NR receivers of one rank each (leg s*NR+x), of which
 * MR are admitted. One slice with data, then an empty last one.
 *
 * Each sender rank admits for itself. A receiver takes a place with its first PULL or DECLINE, or with
 * an END that comes before the Send; when there is no place, or the lease is over, it is answered
 * END(REFUSED). The lease runs until all places are taken.
 *
 * NEVER    the last receiver never comes
 * ABORT n  n cancels
 *
 * V_LEASEFAIL the end of the lease fails the send, running legs too (it only closes the door)
 * V_LEASEGONE the first PULL ends the lease (only the last place does)
 * V_ADMITLATE a PULL is admitted after the lease
 * V_BORN      an END before the Send kills the whole Send (it takes one place)
 * V_DECLRANK  a DECLINE names only the rank, so that it hits every leg of it (it names its receiver)
 * V_FAILALL   one receiver's failure fails all
 * V_RELFIRST  the source is released when the first receiver's legs have been gathered
 */
#ifndef NS
#define NS 1
#endif
#ifndef NR
#define NR 3
#endif
#ifndef MR
#define MR 2
#endif
#ifndef ABORT
#define ABORT 0
#endif
#define NL (NS*NR)
#define SN(l) ((l)/NR)
#define RN(l) ((l)%NR)
byte snd[NS], adm[NS]; bit last[NS], rel[NS], closed[NS];
byte lg[NL];    /* 0 unknown 1 admitted, pulled 2 gathering 3 gathered 4 acked 5 ended 6 refused */
bit gat[NL], dcl[NL], parked[NL], rc[NL], rl[NL]; byte R[NR]; /* 0 idle 2 pulled 3 COMPLETED 4 FAILED 5 declined */
bit mP[NL], mD[NL], mER[NL], mES[NL], mDT[NL], mL[NL], mA[NL]; bit refused[NR], ab[NR], sab; byte aborts;
hidden byte i, j, k, m, n;
#ifdef V_ADMITLATE
#define CLOSED(s) 0
#else
#define CLOSED(s) (closed[s] || rel[s])
#endif
inline check(s){ /* release, then terminal */
  k=1; m=0; n=0; for (i : 0 .. NR-1) { j=(s)*NR+i; if :: gat[j] -> n=1 :: else fi; if :: lg[j]==1||lg[j]==2 -> k=0 :: lg[j]==4 -> m=1 :: else fi };
  if :: (!rel[s] && !n && (snd[s]>=2 || (last[s] && k && (closed[s] || adm[s]==MR
#ifdef V_RELFIRST
    || 1
#endif
    )))) -> rel[s]=1; printf("S%d SOURCE_RELEASED\n",s) :: else fi;
  for (i : 0 .. NR-1) { j=(s)*NR+i; if :: lg[j]==3 -> k=0 :: else fi };
  if :: (snd[s]==1 && last[s] && k && (closed[s] || adm[s]==MR)) -> if :: m -> snd[s]=2; printf("S%d DELIVERED\n",s) :: else -> snd[s]=3; printf("S%d FAILED\n",s) fi; if :: !rel[s] && !n -> rel[s]=1 :: else fi :: else fi; i=0 }
inline failS(s){ snd[s]=3; printf("S%d FAILED\n",s); for (i : 0 .. NR-1) { j=(s)*NR+i; if :: lg[j]>=1 && lg[j]<=3 -> lg[j]=5; mES[j]=1 :: parked[j] -> mES[j]=1 :: else fi }; check(s) }
inline legEnd(l){ lg[l]=5;
#ifdef V_FAILALL
  failS(SN(l))
#else
  check(SN(l))
#endif
  }
inline admit(l){ if :: snd[SN(l)]==1 && !CLOSED(SN(l)) && adm[SN(l)]<MR -> adm[SN(l)]++; lg[l]=1; mL[l]=last[SN(l)]; printf("S%d admits %d\n",SN(l),RN(l)) :: else -> lg[l]=6; if :: closed[SN(l)] || adm[SN(l)]==MR -> refused[RN(l)]=1 :: else fi; mES[l]=1; printf("S%d refuses %d\n",SN(l),RN(l)) fi }
inline born(s){ /* what came before the Send */
#ifdef V_BORN
  k=0; for (i : 0 .. NR-1) { if :: dcl[(s)*NR+i] -> k=1 :: else fi }; if :: k -> failS(s) :: else fi;
#endif
  for (m : 0 .. NR-1) { n=(s)*NR+m; if :: snd[s]==1 && dcl[n] && adm[s]<MR -> adm[s]++; lg[n]=5 :: snd[s]==1 && dcl[n] && adm[s]>=MR -> lg[n]=6 :: !dcl[n] && parked[n] -> admit(n) :: else fi }; check(s) }
inline failR(x){ R[x]=4; printf("R%d FAILED\n",x); for (i : 0 .. NS-1) { mER[i*NR+(x)]=1 }; i=0 }
inline doneR(x){ k=1; for (i : 0 .. NS-1) { if :: !rc[i*NR+(x)] || !rl[i*NR+(x)] -> k=0 :: else fi }; if :: k -> R[x]=3; printf("R%d COMPLETED\n",x) :: else fi; i=0 }
#ifdef V_LEASEGONE
#define LEASE(s) (adm[s]==0)
#else
#define LEASE(s) (adm[s]<MR)
#endif
#ifdef V_LEASEFAIL
#define EXPIRE(s) failS(s)
#else
#define EXPIRE(s) if :: adm[s]==0 -> failS(s) :: else -> check(s) fi
#endif
#ifdef V_DECLRANK
#define DECLS(l) for (m : 0 .. NR-1) { n=SN(l)*NR+m; if :: lg[n]>=1 && lg[n]<=3 -> mES[n]=1; legEnd(n) :: else fi }
#else
#define DECLS(l) skip
#endif
#define SND_(s) \
 :: d_step{ snd[s]==0 -> printf("S%d Send\n",s); snd[s]=1; born(s) } \
 :: d_step{ snd[s]==1 && !last[s] -> printf("S%d Send(last)\n",s); last[s]=1; for (i : 0 .. NR-1) { if :: lg[(s)*NR+i]>=1 && lg[(s)*NR+i]<=3 -> mL[(s)*NR+i]=1 :: else fi }; check(s) } \
 :: d_step{ snd[s]==1 && !closed[s] && LEASE(s) -> printf("S%d lease over\n",s); closed[s]=1; EXPIRE(s) } \
 :: d_step{ aborts<ABORT && snd[s]==1 -> printf("S%d cancel\n",s); aborts++; sab=1; failS(s) }
#define LEG(l) \
 :: d_step{ mP[l] && lg[l]==0 && !parked[l] && snd[SN(l)]==0 -> parked[l]=1; printf("S%d parks PULL of %d\n",SN(l),RN(l)) } \
 :: d_step{ mP[l] && lg[l]==0 && !parked[l] && snd[SN(l)]>=1 -> admit(l) } \
 :: d_step{ mD[l] && lg[l]==0 && !dcl[l] -> printf("S%d gets DECLINE of %d\n",SN(l),RN(l)); dcl[l]=1; if :: snd[SN(l)]==1 && adm[SN(l)]<MR -> adm[SN(l)]++; lg[l]=5; DECLS(l); check(SN(l)) :: else fi } \
 :: d_step{ mER[l] && snd[SN(l)]==0 && !dcl[l] -> dcl[l]=1; printf("S%d gets END of %d before its Send\n",SN(l),RN(l)) } \
 :: d_step{ mER[l] && snd[SN(l)]==1 && lg[l]>=1 && lg[l]<=3 -> printf("S%d gets END of %d\n",SN(l),RN(l)); legEnd(l) } \
 :: d_step{ snd[SN(l)]==1 && lg[l]==1 -> printf("S%d gathers for %d\n",SN(l),RN(l)); assert(!rel[SN(l)]); lg[l]=2; gat[l]=1 } \
 :: d_step{ gat[l] -> printf("S%d gathered for %d\n",SN(l),RN(l)); assert(!rel[SN(l)]); gat[l]=0; if :: lg[l]==2 -> lg[l]=3; mDT[l]=1 :: else fi; check(SN(l)) } \
 :: d_step{ mDT[l] && R[RN(l)]==2 && !rc[l] -> rc[l]=1; mA[l]=rl[l]; doneR(RN(l)) } \
 :: d_step{ mL[l] && R[RN(l)]==2 && !rl[l] -> rl[l]=1; mA[l]=rc[l]; doneR(RN(l)) } \
 :: d_step{ mA[l] && lg[l]==3 && snd[SN(l)]==1 -> lg[l]=4; check(SN(l)) } \
 :: d_step{ mES[l] && R[RN(l)]==2 -> printf("R%d gets END of S%d\n",RN(l),SN(l)); failR(RN(l)) }
#ifdef NEVER
#define COMES(x) ((x)<NR-1)
#else
#define COMES(x) 1
#endif
#define RCV(x) \
 :: d_step{ COMES(x) && R[x]==0 -> printf("R%d Decline\n",x); R[x]=5; for (i : 0 .. NS-1) { mD[i*NR+x]=1 }; i=0 } \
 :: d_step{ COMES(x) && R[x]==0 -> printf("R%d Receive\n",x); R[x]=2; for (i : 0 .. NS-1) { mP[i*NR+x]=1 }; i=0 } \
 :: d_step{ aborts<ABORT && R[x]==2 -> printf("R%d cancel\n",x); aborts++; ab[x]=1; failR(x) }
active proctype M(){
 do
 SND_(0)
 LEG(0) LEG(1)
#if NL>2
 LEG(2)
#endif
#if NL>3
 LEG(3)
#endif
#if NL>4
 LEG(4) LEG(5)
#endif
#if NS==2
 SND_(1)
#endif
 RCV(0) RCV(1)
#if NR==3
 RCV(2)
#endif
 :: else -> break
 od;
 skip; d_step { printf("END S=%d rel=%d R=%d,%d,%d\n",snd[0],rel[0],R[0],R[1],R[NR-1]);
 for (i : 0 .. NS-1) { assert(snd[i]>=2); assert(rel[i]) };
 for (i : 0 .. NL-1) { assert(!gat[i]); if :: lg[i]==4 -> assert(rc[i] && rl[i]) :: else fi };
 for (i : 0 .. NR-1) { assert(R[i]>=3 || !COMES(i)); if :: R[i]==4 && !sab -> assert(refused[i] || ab[i]) :: else fi }; i=0 }
}
