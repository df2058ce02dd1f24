/* Revoke and DROP on one leg. Slice 0 has chunks 0 and 1 with cells 0 and 1; slice 1 is empty and the
 * last; then perhaps a Revoke of both, after which slice 2 (chunk 2, again the last) brings both cells
 * anew. NG landing and STG staging regions.
 *
 * Of two rails, rail 0 with the first control lane c0 may break; the sender then resyncs on c1, and
 * the receiver may go on reading c0 after that. Control from receiver to sender is bits, in any order,
 * lost on a break before the receiver's resync. A scatter writes its cells when it ends. The graph has
 * no cycle: the last block's assertions are the claim that everything ends.
 *
 * BREAK    rail 0 may break
 * ABORT n  n cancels
 * ANYREV   Revoke also when this leg has gathered all (another leg of the send has not)
 *
 * V_SCATWAIT    the new slice is scattered beside a running scatter of a dropped one
 * V_LANDKEPT    data that lands for a dropped slice is scattered
 * V_STAGEDROP   the staging of a dropped chunk is held until an acknowledgement
 * V_DROPCRED    a lost lane gives back only the credits of chunks that still count
 * V_RESYNCORDER the resync tells SLICEs before DROPs
 * V_LASTKEPT    an empty last slice is not dropped (it has no token that the revoked ranges would hit)
 * V_UNSTICKY    a SLICE after its DROP revives it
 * V_HELDDROP    held offers of a dropped slice stay held
 * V_DROPUNK     the DROP of an unknown slice is ignored (it is remembered)
 * V_ENDCOMPL    END(COMPLETED) does not end the sender's leg
 * V_REVEARLY    Revoke returns while a gather runs
 */
#ifndef NG
#define NG 1
#endif
#ifndef STG
#define STG 1
#endif
#ifndef BREAK
#define BREAK 0
#endif
#ifndef ABORT
#define ABORT 0
#endif
#define NC 3
#define NO 6
#define NQ 7
#define FREE 0
#define GRANTED 1
#define LANDING 2
#define LANDED 3
#define SCAT 4
#define QUAR 5
#define SL(c) ((c)==2 -> 2 : 0)
byte S=1, R=1, rev; bit p1, p2, bound;
byte sc[NC], na[NC]; bit sh[NC]; byte so[NO], ofr[NO], oq[NO]; bit ork[NO];
byte cs[NQ], rq[NQ], rqg[NQ], nq; byte rg[NG], rgo[NG], rc[NC], rs[3], cell[2], cnt[NC];
bit mAE, sAE, mCR[NQ], mA[NC], mREF[NO], mES, mER, mERC, brk, sdn, rdn, rsR; byte aborts;
chan c0=[4] of {byte}; chan c1=[6] of {byte};
hidden byte i, j, k, c, o, q, g, g0, x;
#define CUR(c) ((c)*2+na[c]-1)
#define SLOTFREE(y) (so[y]!=1 && (ofr[y]==0||ofr[y]==5) && rgo[0]!=(y)+1 && rgo[NG-1]!=(y)+1)
#define SEND(m) if :: !sdn -> if :: !brk && nfull(c0) -> c0!m :: else fi :: else -> c1!m fi
inline stag(c){ if :: (sh[c] && sc[c]!=1 && so[(c)*2]!=1 && so[(c)*2+1]!=1 && (sc[c]==4 || S>=2
#ifndef V_STAGEDROP
   || sc[c]==5
#endif
   )) -> sh[c]=0 :: else fi }
inline endS(y){ S=y; if :: y==3 -> mES=1 :: else fi; stag(0); stag(1); stag(2) }
inline doneS(){ if :: S==1 && ((rev==0 && p1 && sAE && sc[0]==4 && sc[1]==4) || (p2 && sc[2]==4)) -> printf("S DELIVERED\n"); endS(2) :: else fi }
inline freeR(g){ for (j : 0 .. NO-1) { assert(!(ofr[j]==3 && rgo[g]==j+1 && rg[g]>=LANDING)) }; rg[g]=FREE; rgo[g]=0 }
inline spend(q){ if :: rq[q]==1 -> rq[q]=2; g0=rqg[q]; rg[g0]=FREE; rgo[g0]=0 :: else fi }
inline endR(y){ R=y; if :: y==3 -> mER=1 :: else -> mERC=1 fi; for (i : 0 .. NQ-1) { spend(i) }; for (i : 0 .. NO-1) { if :: ofr[i]==2 -> ofr[i]=5 :: else fi };
  for (i : 0 .. NG-1) { if :: rg[i]==LANDING -> rg[i]=QUAR :: rg[i]==LANDED -> rg[i]=FREE; rgo[i]=0 :: else fi }; i=0 }
#ifdef V_LANDKEPT
#define GONE(c) 0
#else
#define GONE(c) (rs[SL(c)]==2)
#endif
/* A spent credit is refused though its slice is not known, once another SLICE has bound the leg. */
#define EARLY(c,q) (bound && rs[SL(c)]==0 && rq[q]!=1)
inline offerIn(o){ c=o/2; q=oq[o];
  if :: R!=1 -> ofr[o]=5
     :: R==1 && rs[SL(c)]==2 -> ofr[o]=5; spend(q)
     :: R==1 && rs[SL(c)]!=2 && rc[c]==2 -> ofr[o]=5; spend(q); mA[c]=1
     :: R==1 && rs[SL(c)]!=2 && rc[c]==3 -> ofr[o]=5; spend(q)
     :: R==1 && rs[SL(c)]!=2 && rc[c]<2 && (rs[SL(c)]==0 || rc[c]==1) && !EARLY(c,q) -> ofr[o]=2
     :: R==1 && rc[c]<2 && EARLY(c,q) -> ofr[o]=5; mREF[o]=1
     :: R==1 && rs[SL(c)]==1 && rc[c]==0 && rq[q]==1 -> rq[q]=2; g0=rqg[q]; rg[g0]=LANDING; rgo[g0]=o+1; rc[c]=1; ofr[o]=3
     :: R==1 && rs[SL(c)]==1 && rc[c]==0 && rq[q]!=1 -> ofr[o]=5; mREF[o]=1
  fi }
#ifdef V_HELDDROP
#define HD(x) (rs[SL((x)/2)]!=2)
#else
#define HD(x) 1
#endif
inline held(){ for (x : 0 .. NO-1) { if :: ofr[x]==2 && R==1 && HD(x) -> o=x; offerIn(o) :: else fi }; x=0 }
inline compl(){ if :: R==1 && ((rs[0]==1 && rs[1]==1 && rc[0]==2 && rc[1]==2) || (rs[2]==1 && rc[2]==2
#ifdef V_LASTKEPT
   && rs[1]==1
#endif
   )) -> printf("R COMPLETED\n"); endR(2) :: else fi }
inline slice(m){ /* 1: SLICE 0, 2: SLICE 1, 3: DROP 0 and 1, 4: SLICE 2 */
  bound = bound || m!=3;
  if :: R!=1 -> skip
     :: R==1 && m==1 -> printf("R gets SLICE 0\n");
#ifdef V_UNSTICKY
        rs[0]=1; held()
#else
        if :: rs[0]==0 -> rs[0]=1; held() :: else fi
#endif
     :: R==1 && m==2 -> printf("R gets SLICE 1 (last)\n"); if :: rs[1]==0 -> rs[1]=1; mAE=1 :: else fi; compl()
     :: R==1 && m==3 -> printf("R gets DROP\n");
#ifdef V_DROPUNK
        if :: rs[0]!=0 -> rs[0]=2; rs[1]=2 :: else fi;
#else
        rs[0]=2;
#ifndef V_LASTKEPT
        rs[1]=2;
#endif
#endif
        assert(rs[1]!=1); /* else: last slice in, cells missing: NOT_OFFERED */
#ifndef V_LANDKEPT
        for (i : 0 .. NG-1) { if :: rg[i]==LANDED && rgo[i]<=4 -> rg[i]=FREE; rgo[i]=0 :: else fi };
#endif
        held();
        i=0
     :: R==1 && m==4 -> printf("R gets SLICE 2 (last)\n"); assert(rs[0]!=1); /* else: overlap, FAILED(PROTOCOL) */ if :: rs[2]==0 -> rs[2]=1; held() :: else fi
  fi }
#define NEED (rs[2]==1 -> (rc[2]!=2) : (rs[0]==1 -> (rc[0]!=2)+(rc[1]!=2) : 1))
#define OUT ((rg[0]>=GRANTED && rg[0]<=SCAT) + (NG>1 && rg[NG-1]>=GRANTED && rg[NG-1]<=SCAT))
#define STAGED (sh[0]+sh[1]+sh[2])
#ifdef ANYREV
#define MAYREV 1
#else
#define MAYREV (sc[0]<2 || sc[1]<2)
#endif
#ifdef V_SCATWAIT
#define OLDSCAT 0
#else
#define OLDSCAT ((rg[0]==SCAT && rgo[0]<=4) || (rg[NG-1]==SCAT && rgo[NG-1]<=4))
#endif
#define OFFER(c,q,k,l) :: d_step{ sc[c]==2 && S==1 && cs[q]==1 && (k==1 || !sdn) && SLOTFREE((c)*2+l) && (l==0 || !SLOTFREE((c)*2)) && ((q)==0||cs[0]!=1) && ((q)<=1||cs[1]!=1) && ((q)<=2||cs[2]!=1) -> \
   printf("S offers chunk %d credit %d rail %d\n",c,q,k); o=(c)*2+l; na[c]=l+1; so[o]=1; ofr[o]=1; oq[o]=q; ork[o]=k; mREF[o]=0; cs[q]=2; sc[c]=3 }
#define OFQ(c,q) OFFER(c,q,0,0) OFFER(c,q,0,1) OFFER(c,q,1,0) OFFER(c,q,1,1)
#define CH(c) OFQ(c,0) OFQ(c,1) OFQ(c,2) OFQ(c,3) OFQ(c,4) OFQ(c,5) OFQ(c,6) \
 :: d_step{ sc[c]==0 && S==1 && STAGED<STG && (c==0 || c==1&&sc[0]>=2 || c==2&&p2) -> printf("S gathers %d\n",c); assert(c==2 || rev<2); sc[c]=1; sh[c]=1 } \
 :: d_step{ sc[c]==1 -> printf("S gathered %d\n",c); assert(c==2 || rev<2); sc[c]=((c<2 && rev) -> 5 : 2); stag(c) } \
 :: d_step{ mA[c] && S==1 && sc[c]!=4 && sc[c]!=5 -> printf("S gets ACK %d\n",c); sc[c]=4; stag(c); doneS() } \
 :: d_step{ BREAK && brk && !rsR && mA[c] && rc[c]==2 -> mA[c]=0; printf("ack %d lost\n",c) }
#define CRD(q) :: d_step{ mCR[q] && cs[q]==0 && S==1 -> cs[q]=1; printf("S gets CREDIT %d\n",q) } \
 :: d_step{ BREAK && brk && !rsR && mCR[q] && cs[q]==0 -> mCR[q]=0; printf("credit %d lost\n",q) }
#define OF(y) \
 :: d_step{ mREF[y] && S==1 && sc[(y)/2]==3 && CUR((y)/2)==y -> printf("S gets REFUSE %d\n",y); sc[(y)/2]=2 } \
 :: d_step{ BREAK && brk && !sdn && mREF[y] && ork[y]==0 -> mREF[y]=0 } \
 :: d_step{ ofr[y]==1 && !(rdn && ork[y]==0) -> printf("R sees offer %d\n",y); o=y; offerIn(o) } \
 :: d_step{ ofr[y]==1 && ork[y]==0 && brk -> printf("offer %d lost\n",y); ofr[y]=5 } \
 :: d_step{ ofr[y]==3 && so[y]==1 && !(brk && sdn && ork[y]==0) -> printf("data of offer %d lands\n",y); assert(sh[(y)/2]); ofr[y]=4 } \
 :: d_step{ ofr[y]==4 -> ofr[y]=5; printf("R recv %d ended OK\n",y); c=(y)/2; for (i : 0 .. NG-1) { if :: rgo[i]==y+1 -> if :: rg[i]==LANDING && !GONE(c) -> rg[i]=LANDED; rc[c]=3; \
      k=(y)^1; if :: ofr[k]==2 -> ofr[k]=5; q=oq[k]; spend(q) :: else fi :: rg[i]==LANDING && GONE(c) -> freeR(i) :: rg[i]==QUAR -> freeR(i) :: else fi :: else fi }; i=0 } \
 :: d_step{ ofr[y]==3 && rdn && ork[y]==0 -> ofr[y]=5; printf("R recv %d ended ERR\n",y); for (i : 0 .. NG-1) { if :: rgo[i]==y+1 -> freeR(i) :: else fi }; i=0 } \
 :: d_step{ so[y]==1 && ofr[y]>=4 -> so[y]=2; stag((y)/2) } \
 :: d_step{ so[y]==1 && ofr[y]!=4 && sdn && ork[y]==0 -> so[y]=3; stag((y)/2) }
#define RG(g) \
 :: d_step{ rg[g]==LANDED && R==1 && (rgo[g]<=4 || !OLDSCAT) -> c=(rgo[g]-1)/2; printf("R scatters chunk %d\n",c); cnt[c]++; assert(cnt[c]==1); rg[g]=SCAT } \
 :: d_step{ rg[g]==SCAT -> c=(rgo[g]-1)/2; printf("R scattered chunk %d\n",c); if :: c==2 -> cell[0]=2; cell[1]=2 :: else -> cell[c]=1 fi; assert(R!=2); freeR(g); if :: R==1 && rs[SL(c)]==1 -> rc[c]=2; mA[c]=1; compl() :: else fi } \
 :: d_step{ R==1 && nq<NQ && rg[g]==FREE && (g==0 || rg[0]!=FREE) && OUT<NEED -> printf("R credit %d\n",nq); rq[nq]=1; rqg[nq]=g; rg[g]=GRANTED; rgo[g]=0; mCR[nq]=1; nq++ }
active proctype M(){
 d_step{ c0!1 };
 do
 :: d_step{ S==1 && !p1 && rev==0 -> printf("S Send(1, last, empty)\n"); p1=1; SEND(2); doneS() }
 :: d_step{ S==1 && rev==0 && MAYREV -> printf("S Revoke\n"); rev=1; for (i : 0 .. 1) { if :: sc[i]!=1 -> sc[i]=5 :: else fi }; SEND(3); stag(0); stag(1) }
#ifdef V_REVEARLY
 :: d_step{ rev==1 -> printf("Revoke returns\n"); rev=2 }
#else
 :: d_step{ rev==1 && sc[0]!=1 && sc[1]!=1 -> printf("Revoke returns\n"); rev=2 }
#endif
 :: d_step{ S==1 && rev==2 && !p2 -> printf("S Send(2, last)\n"); p2=1; SEND(4) }
 :: d_step{ len(c0)>0 && !rdn -> c0?k; slice(k) }
 :: d_step{ len(c1)>0 -> c1?k; slice(k) }
 :: d_step{ len(c0)>0 && brk -> printf("control lane 0: rest lost\n"); do :: len(c0)>0 -> c0?k :: else -> break od; k=0 }
 CH(0) CH(1) CH(2)
 CRD(0) CRD(1) CRD(2) CRD(3) CRD(4) CRD(5) CRD(6)
 OF(0) OF(1) OF(2) OF(3) OF(4) OF(5)
 RG(0)
#if NG==2
 RG(1)
#endif
 :: d_step{ mAE && !sAE && S==1 -> sAE=1; doneS() }
 :: d_step{ BREAK && brk && !rsR && mAE -> mAE=0 }
 :: d_step{ mES && R==1 -> printf("R gets END\n"); endR(3) }
 :: d_step{ mER && S==1 -> printf("S gets END\n"); endS(3) }
#ifndef V_ENDCOMPL
 :: d_step{ mERC && S==1 -> printf("S gets END(COMPLETED): DELIVERED\n"); endS(2) }
#endif
 :: d_step{ BREAK && !brk -> brk=1; printf("rail 0 breaks\n") }
 :: d_step{ brk && !sdn -> sdn=1; printf("S sees rail 0 down, resync\n"); for (i : 0 .. NC-1) { if :: na[i]>0 && ork[CUR(i)]==0 && sc[i]==3 -> sc[i]=2; cs[oq[CUR(i)]]=1
#ifndef V_DROPCRED
      :: na[i]>0 && ork[CUR(i)]==0 && sc[i]==5 -> cs[oq[CUR(i)]]=1
#endif
      :: else fi };
#ifdef V_RESYNCORDER
      if :: p2 -> c1!4 :: else fi; if :: rev -> c1!3 :: else -> c1!1; if :: p1 -> c1!2 :: else fi fi
#else
      if :: rev -> c1!3 :: else -> c1!1; if :: p1 -> c1!2 :: else fi fi; if :: p2 -> c1!4 :: else fi
#endif
      }
 :: d_step{ brk && !rdn -> rdn=1; printf("R sees rail 0 down\n"); for (i : 0 .. NO-1) { if :: ofr[i]==2 && ork[i]==0 -> ofr[i]=5 :: ofr[i]==3 && ork[i]==0 && R==1 -> rc[i/2]=0; for (j : 0 .. NG-1) { if :: rgo[j]==i+1 -> rg[j]=QUAR :: else fi } :: else fi }; held() }
 :: d_step{ rdn && !rsR -> rsR=1; printf("R resync\n"); for (i : 0 .. NC-1) { if :: rc[i]==2 -> mA[i]=1 :: else fi }; for (i : 0 .. NQ-1) { if :: rq[i]==1 -> mCR[i]=1 :: else fi }; if :: rs[1]==1 -> mAE=1 :: else fi; i=0 }
 :: d_step{ aborts<ABORT && R==1 -> aborts++; printf("R cancel\n"); endR(3) }
 :: d_step{ aborts<ABORT && S==1 -> aborts++; printf("S cancel\n"); endS(3) }
 :: else -> break
 od;
 skip; d_step { printf("END S=%d R=%d rev=%d nq=%d cells %d %d\n",S,R,rev,nq,cell[0],cell[1]);
 assert(S>=2 && R>=2);
 for (i : 0 .. NG-1) { assert(rg[i]==FREE) }; for (i : 0 .. NC-1) { assert(!sh[i]) }; for (i : 0 .. NO-1) { assert(so[i]!=1 && (ofr[i]==0||ofr[i]==5)) };
 if :: R==2 && rs[2]==1 -> assert(cell[0]==2 && cell[1]==2) :: R==2 && rs[2]!=1 -> assert(cell[0]==1 && cell[1]==1 && cnt[0]==1 && cnt[1]==1) :: else fi;
 if :: S==2 -> assert(R==2) :: else fi;
 if :: aborts==0 -> assert(S==2 && R==2) :: else fi; i=0 }
}
