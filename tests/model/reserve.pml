/* Reservations in arenas of CAP regions at nodes X and Y that landing and staging share.
 *
 * For each direction d there are REQ chunks without a reservation (class 0) and RES chunks of one
 * reserved transfer (class 1) with G guaranteed regions at the receiving node. Those are kept free for
 * it. Credits within the guarantee are never withdrawn; credits beyond it are, before the transfer's
 * first SLICE, when another one waits. Floors: landing leaves E+1 regions, staging leaves 1. A
 * reservation is admitted if G + 1 + (E+1) <= CAP.
 *
 * There is no timer: a run must end with all done.
 *
 * DEP      the reserved transfer's worker sends only when all others are done (its memory is full)
 * E n      n chunks of a node may be gathered ahead of their credit
 * QUARN n  n landing regions of each node may be quarantined for good; their chunks stay staged and
 *          wait for another credit
 *
 * V_FIT (in configurations.txt: CAP=2 with V_QUAR) admits a reservation without the 1 above
 * V_NOPRIO     staged chunks without a credit are not served first, nor are unused credits withdrawn
 *              for them when regions are quarantined
 * V_NOWITHDRAW credits beyond the guarantee are not withdrawn either
 * V_QUAR       guarantees do not shrink when regions are quarantined
 * V_FLOOR      reserved landings ignore the floor
 *
 * V_STAGEGUAR lets staging take idle guaranteed regions and the last one; as far as this model goes
 * that does no harm, so it is a variant (configuration s1) and no flaw.
 */
#ifndef REQ
#define REQ 2
#endif
#ifndef RES
#define RES 2
#endif
#ifndef G
#define G 1
#endif
#ifndef E
#define E 0
#endif
#ifndef CAP
#define CAP (G+E+2)
#endif
#ifndef QUARN
#define QUARN 0
#endif
byte ready[4], cred[4], stg[4], unst[4], land[4], done[4], qu[2]; /* index d*2+class */
#define H(k) (cred[k]+stg[k]+land[k])
#define LR(n) H((1-(n))*2+1)
#define LU(n) (H((1-(n))*2)+LR(n))
#define SU(n) (stg[(n)*2]+unst[(n)*2]+stg[(n)*2+1]+unst[(n)*2+1])
#define T(n) (LU(n)+SU(n)+qu[n])
#define CP(n) (CAP-qu[n])
#ifdef V_QUAR
#define GU(n) G
#else
#define GU(n) (CP(n)>=G+E+2 -> G : (CP(n)>E+2 -> CP(n)-E-2 : 0))
#endif
#define LEFT(n) (RES-done[(1-(n))*2+1])           /* reserved chunks not done */
#define WANT(n) (LEFT(n)<GU(n) -> LEFT(n) : GU(n))
#define IDLE(n) (WANT(n)>LR(n) -> WANT(n)-LR(n) : 0)
#define FREEU(n) (T(n)+IDLE(n)<CAP && LU(n)+IDLE(n)+E+1<CP(n))
#ifdef V_FLOOR
#define FREER(n) (T(n)<CAP)
#else
#define FREER(n) (LR(n)<GU(n) -> (T(n)<CAP && LU(n)+E+1<CP(n)) : (FREEU(n) && BEY(n)))
#endif
#ifdef V_STAGEGUAR
#define FREES(n) (T(n)<CAP)
#else
#define FREES(n) (T(n)+IDLE(n)<CAP && SU(n)+1<CP(n))
#endif
#define FREEL(k) ((k)%2 -> FREER(1-(k)/2) : FREEU(1-(k)/2))
#ifdef DEP
#define MAYSEND(k) ((k)%2==0 || (done[0]==REQ && done[2]==REQ))
#else
#define MAYSEND(k) 1
#endif
#ifdef V_NOPRIO
#define PRI(k) 1
#define WQ(k)
#else
#define PRI(k) (unst[(k)^1]==0)
#define WQ(k) :: d_step{ unst[k]>0 && !FREEL(k) && cred[k]==0 && cred[(k)^1]>0 && qu[1-(k)/2]>0 && !CREDN((k)^1) -> cred[(k)^1]--; ready[(k)^1]++; printf("credit %d withdrawn for staged %d\n",(k)^1,k) }
#define CREDN(k) (FREES((k)/2) && MAYSEND(k))
#endif
#define K(k) WQ(k) \
 :: d_step{ ready[k]>0 && unst[k]==0 && PRI(k) && FREEL(k) -> ready[k]--; cred[k]++; printf("credit %d\n",k) } \
 :: d_step{ unst[k]>0 && FREEL(k) -> unst[k]--; stg[k]++; printf("credit for staged %d\n",k) } \
 :: d_step{ cred[k]>0 && unst[k]==0 && FREES((k)/2) && MAYSEND(k) -> cred[k]--; stg[k]++; printf("gather %d\n",k) } \
 :: d_step{ ready[k]>0 && cred[k]==0 && FREES((k)/2) && MAYSEND(k) && unst[((k)/2)*2]+unst[((k)/2)*2+1]<E -> ready[k]--; unst[k]++; printf("gather ahead %d\n",k) } \
 :: d_step{ cred[k]>0 && unst[k]>0 -> cred[k]--; ready[k]++; unst[k]--; stg[k]++; printf("credit of leg %d goes to its staged chunk\n",k) } \
 :: d_step{ stg[k]>0 -> stg[k]--; land[k]++; printf("landed %d\n",k) } \
 :: d_step{ land[k]>0 -> land[k]--; done[k]++; printf("done %d\n",k) }
#define SWAIT(n) ((cred[(n)*2]>0 || cred[(n)*2+1]>0 && MAYSEND(1)) && !FREES(n)) /* a credited chunk waits for staging */
#ifdef V_NOWITHDRAW
#define BEY(n) 1
#define WD(d)
#else
#define BEY(n) (MAYSEND(1) || ready[(1-(n))*2]+unst[(1-(n))*2]==0)
#define WD(d) :: d_step{ !MAYSEND(1) && cred[(d)*2+1]>0 && LR(1-(d))>GU(1-(d)) && (ready[(d)*2]+unst[(d)*2]>0 && !FREEU(1-(d)) || SWAIT(1-(d))) -> cred[(d)*2+1]--; ready[(d)*2+1]++; printf("credit %d withdrawn\n",(d)*2+1) }
#endif
active proctype M(){
 d_step{ ready[0]=REQ; ready[2]=REQ; ready[1]=RES; ready[3]=RES };
 do
 K(0) K(1) K(2) K(3) WD(0) WD(1)
 :: d_step{ qu[1]<QUARN && stg[0]>0 -> qu[1]++; stg[0]--; unst[0]++; printf("region of 0 quarantined, chunk staged without credit\n") }
 :: d_step{ qu[1]<QUARN && stg[1]>0 -> qu[1]++; stg[1]--; unst[1]++; printf("region of 1 quarantined, chunk staged without credit\n") }
 :: d_step{ qu[0]<QUARN && stg[2]>0 -> qu[0]++; stg[2]--; unst[2]++; printf("region of 2 quarantined, chunk staged without credit\n") }
 :: d_step{ qu[0]<QUARN && stg[3]>0 -> qu[0]++; stg[3]--; unst[3]++; printf("region of 3 quarantined, chunk staged without credit\n") }
 :: else -> break
 od;
 assert(done[0]==REQ && done[1]==RES && done[2]==REQ && done[3]==RES) }
