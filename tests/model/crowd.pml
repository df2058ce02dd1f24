/* Many requests in one arena: REQ of them in each direction between nodes X and Y, CAP regions a node
 * for landing and staging together, of which KL are never taken by staging and KS never by landing.
 * A chunk needs its credit first; with EAGER n, n chunks may be gathered ahead of theirs. Counters
 * without names, one set for each direction d (0: X to Y, 1: Y to X). A run must end with all done.
 */
#ifndef REQ
#define REQ 3
#endif
#ifndef CAP
#define CAP 3
#endif
#ifndef KL
#define KL 0
#endif
#ifndef KS
#define KS 0
#endif
byte ready[2]=REQ; byte cred[2], stg[2], unst[2], land[2], done[2]; /* cred: credit granted, chunk not gathered; stg: staged and offered; unst: staged without credit (eager); land: landed */
#define LUSED(n) (cred[1-(n)]+stg[1-(n)]+land[1-(n)])
#define SUSED(n) (stg[n]+unst[n])
#define FREEL(n) (LUSED(n)+SUSED(n)<CAP && LUSED(n)<CAP-KS)
#define FREES(n) (LUSED(n)+SUSED(n)<CAP && SUSED(n)<CAP-KL)
#define D(d) \
 :: d_step{ ready[d]>0 && FREEL(1-d) -> ready[d]--; cred[d]++; printf("credit dir %d\n",d) } \
 :: d_step{ unst[d]>0 && FREEL(1-d) -> unst[d]--; stg[d]++ } \
 :: d_step{ cred[d]>0 && FREES(d) -> cred[d]--; stg[d]++; printf("gather dir %d\n",d) } \
 :: d_step{ stg[d]>0 -> stg[d]--; land[d]++ } \
 :: d_step{ land[d]>0 -> land[d]--; done[d]++ } EAGERD(d)
#ifdef EAGER
#define EAGERD(d) :: d_step{ ready[d]>0 && FREES(d) && unst[d]<EAGER -> ready[d]--; unst[d]++; printf("eager gather dir %d\n",d) }
#else
#define EAGERD(d)
#endif
active proctype M(){ do
 D(0)
 D(1)
 :: else -> break od; assert(done[0]==REQ && done[1]==REQ) }
