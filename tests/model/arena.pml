/* Can requests that compete for bounce memory block each other for ever? Two nodes X and Y, requests
 * 0 and 1 of one chunk each, no deadline and no failure: a run must end with everything done.
 *
 * rec[n] counts landing regions at node n and snd[n] staging regions there.
 *
 * DIR2       request 0 goes from X to Y and request 1 from Y to X; else both go from X to Y
 * SHARED     landing and staging share one arena of CAP regions a node; else each has CAP
 * KEEP n     n regions of the shared arena that staging never takes
 * EAGER      a chunk may be gathered before it has a credit ...
 * STAGECAP n ... by at most n chunks a node
 * DEP        the worker sends slice 0 only after request 1 has released its source (the memory of the
 *            prefill worker is full)
 * SOFT       the receiver withdraws a credit that nobody uses when another request wants its region
 */
#ifndef CAP
#define CAP 1
#endif
#ifndef KEEP
#define KEEP 0
#endif
#ifndef STAGECAP
#define STAGECAP 9
#endif
#ifdef DIR2
#define SN(r) (r)
#define RN(r) (1-(r))
#else
#define SN(r) 0
#define RN(r) 1
#endif
byte rec[2], snd[2];            /* used */
byte credstate[2];              /* 0 none 1 granted 2 dead(withdrawn) */
byte chunk[2];                  /* 0 no Send yet 1 ready 2 gathering 3 staged without credit 4 with credit, offered 5 landed 6 done */
byte ngr[2];                    /* grants so far, bounds withdraw ping-pong */
#ifdef SHARED
#define FREEL(n) (rec[n]+snd[n] < CAP)
#define FREES(n) (rec[n]+snd[n] < CAP && snd[n] < CAP-KEEP)
#else
#define FREEL(n) (rec[n] < CAP)
#define FREES(n) (snd[n] < CAP)
#endif
#define NOCRED(n) ((chunk[0]==3&&SN(0)==n)+(chunk[1]==3&&SN(1)==n))
#ifdef DEP
#define MAYSEND(r) (r==1 || chunk[1]==6)
#else
#define MAYSEND(r) 1
#endif
#ifdef EAGER
#define MAYGATHER(r) (credstate[r]==1 || NOCRED(SN(r)) < STAGECAP)
#else
#define MAYGATHER(r) (credstate[r]==1)
#endif
#define ACTS(r) \
 :: d_step{ chunk[r]==0 && MAYSEND(r) -> printf("Send(%d)\n",r); chunk[r]=1 } \
 :: d_step{ credstate[r]!=1 && chunk[r]<5 && FREEL(RN(r)) && ngr[r]<4 && (ngr[r]==0 || chunk[r]>=1) -> printf("credit for %d\n",r); credstate[r]=1; rec[RN(r)]++; ngr[r]++ } \
 :: d_step{ chunk[r]==1 && FREES(SN(r)) && MAYGATHER(r) -> printf("gather %d (staging region taken)\n",r); chunk[r]=2; snd[SN(r)]++ } \
 :: d_step{ chunk[r]==2 -> chunk[r]=3; printf("gathered %d\n",r) } \
 :: d_step{ chunk[r]==3 && credstate[r]==1 -> chunk[r]=4; printf("offered+accepted %d\n",r) } \
 :: d_step{ chunk[r]==4 -> chunk[r]=5; printf("landed, acked %d\n",r); snd[SN(r)]-- } \
 :: d_step{ chunk[r]==5 -> chunk[r]=6; rec[RN(r)]--; credstate[r]=2; printf("scattered %d, source released\n",r) }
#define WITHDRAW(r) \
 :: d_step{ credstate[r]==1 && chunk[r]==0 && chunk[1-r]>=1 && chunk[1-r]<5 && credstate[1-r]!=1 && RN(r)==RN(1-r) && !FREEL(RN(r)) -> printf("credit of %d withdrawn\n",r); credstate[r]=2; rec[RN(r)]-- }
active proctype M(){
 do
 ACTS(0)
 ACTS(1)
#ifdef SOFT
 WITHDRAW(0)
 WITHDRAW(1)
#endif
 :: else -> break
 od;
 assert(chunk[0]==6 && chunk[1]==6); assert(rec[0]+rec[1]+snd[0]+snd[1]==0)
}
