/* What an END says, and who may say it. One leg that must bring cells 0 and 1. Slice 0 brings them, or
 * cell 0 alone; slice 1 is empty and the last; then perhaps a Revoke of both, after which slice 2, again
 * the last, brings both anew, cell 0 alone, or nothing. A chunk has one cell; credits, offers and
 * staging are drop.pml's.
 *
 * Control from the sender goes by lane c0, which may break; the sender then resyncs on c1, and the
 * receiver may go on reading c0 after that, so that its last slice may be an older message than the DROP
 * it knows. What the receiver says are bits. The graph has no cycle.
 *
 * LIAR 1  the receiver says END(COMPLETED) whenever it likes, and nothing after that
 * LIAR 2  the sender says END(DELIVERED) whenever it likes, and nothing after that
 *
 * V_EARLYCOMPL  END(COMPLETED) is DELIVERED though no last slice was told (nobody is complete who does
 *               not know the last one: a protocol error)
 * V_DELIVERLESS the sender says DELIVERED as soon as all that counts is acknowledged (less than the leg
 *               must bring is NOT_OFFERED)
 * V_SAYNOTHING  it leaves that to the receiver
 * V_JUDGELAST   the receiver says NOT_OFFERED as soon as its last slice is in, though a slice was dropped
 *               (that last slice may be an older message; the sender's END tells)
 * V_BELIEVE     END(DELIVERED) makes the receiver COMPLETED, whatever is missing (all acknowledged and
 *               bytes missing is NOT_OFFERED, anything else contradicts the acknowledgements)
 */
#ifndef LIAR
#define LIAR 0
#endif
#define LIVE 1
#define WELL 2 /* DELIVERED, COMPLETED */
#define FAIL 3
#define LIED 4
/* why FAIL */
#define NOTOFF 1
#define PROTO 2
/* control messages */
#define SLICE 1 /* 1, 2, 3: slice 0, 1, 2 */
#define DROP0 4
#define DROP1 5
#define ENDWELL 6
#define ENDNOTOFF 7
#define ENDPROTO 8
byte S=LIVE, R=LIVE, swhy, rwhy;
byte n0, n2; /* chunks of slices 0 and 2 */
bit p0, p1, p2, rev, told; /* sent by the worker; a last slice has been told */
bit ack[5], sack[5]; /* said by R, heard by S: chunks of slice 0, the empty slice 1, chunks of slice 2 */
byte rs[3]; /* at R: 0 unknown 1 counts 2 dropped */
bit rdone[5], dropped; byte cell[2]; /* which slice it has from */
bit mERC, mERF, brk, sdn, rdn;
chan c0=[6] of {byte}; chan c1=[9] of {byte};
hidden byte k, m;
#define TELL(x) if :: !sdn -> if :: !brk -> c0!x :: else fi :: else -> c1!x fi
/* What the slices that count bring, and whether all of it has been acknowledged, or is here. */
#define SBYTES (rev -> (p2 -> n2 : 0) : n0)
#define SLAST (rev -> p2 : p1)
#define SACKED (rev -> ((n2==0 -> sack[3] : sack[3] && (n2==1 || sack[4]))) : (sack[2] && sack[0] && (n0==1 || sack[1])))
#define RBYTES ((rs[0]==1 -> n0 : 0) + (rs[2]==1 -> n2 : 0))
#define RLAST (rs[1]==1 || rs[2]==1)
#define RDONE (((rs[0]!=1) || (rdone[0] && (n0==1 || rdone[1]))) && ((rs[2]!=1) || ((n2==0 || rdone[3]) && (n2<2 || rdone[4]))))
inline endS(x,why) { S=x; swhy=why; if :: x==WELL -> TELL(ENDWELL) :: x==FAIL && why==NOTOFF -> TELL(ENDNOTOFF) :: x==FAIL && why!=NOTOFF -> TELL(ENDPROTO) :: else fi }
inline acked() {
  if :: S==LIVE && SLAST && SACKED ->
#ifdef V_DELIVERLESS
       printf("S DELIVERED\n"); endS(WELL,0)
#else
       if :: SBYTES==2 -> printf("S DELIVERED\n"); endS(WELL,0)
#ifdef V_SAYNOTHING
          :: else
#else
          :: else -> printf("S NOT_OFFERED\n"); endS(FAIL,NOTOFF)
#endif
       fi
#endif
     :: else fi }
inline failR(why) { R=FAIL; rwhy=why; mERF=1 }
inline judge() {
  if :: R==LIVE && RLAST && RBYTES==2 && RDONE -> printf("R COMPLETED\n"); R=WELL; mERC=1
#ifdef V_JUDGELAST
     :: R==LIVE && RLAST && RBYTES!=2 -> printf("R NOT_OFFERED\n"); failR(NOTOFF)
#else
     :: R==LIVE && RLAST && RBYTES!=2 && !dropped -> printf("R NOT_OFFERED\n"); failR(NOTOFF)
#endif
     :: else fi }
/* A DROP takes the last slice with it that is known so far: slice 1, as slice 2 comes after both. */
inline hear(x) {
  if :: R!=LIVE -> skip
     :: R==LIVE && x<=3 -> printf("R gets SLICE %d\n",x-1); if :: rs[x-1]==0 -> rs[x-1]=1; if :: x==2 -> ack[2]=1 :: x==3 && n2==0 -> ack[3]=1 :: else fi :: else fi; judge()
     :: R==LIVE && x==DROP0 -> printf("R gets DROP 0\n"); rs[0]=2; dropped=1; if :: rs[1]==1 -> rs[1]=2 :: else fi
     :: R==LIVE && x==DROP1 -> printf("R gets DROP 1\n"); rs[1]=2; dropped=1
     :: R==LIVE && x==ENDWELL -> printf("R gets END(DELIVERED)\n");
#ifdef V_BELIEVE
        R=WELL; mERC=1
#else
        if :: RLAST && RBYTES!=2 && RDONE -> failR(NOTOFF) :: else -> failR(PROTO) fi
#endif
     :: R==LIVE && x==ENDNOTOFF -> printf("R gets END(NOT_OFFERED)\n"); failR(NOTOFF)
     :: R==LIVE && x==ENDPROTO -> printf("R gets END(PROTOCOL)\n"); failR(PROTO)
  fi }
/* Chunk a of a slice (its bit in ack) arrives and is scattered. Nothing of a dropped slice is sent. */
#define BRINGS(a,s,c,n,sent) :: d_step{ sent && S==LIVE && R==LIVE && rs[s]==1 && n>c && !rdone[a] -> printf("R has cell %d of slice %d\n",c,s); rdone[a]=1; cell[c]=s+1; ack[a]=1; judge() }
#define ACK(a) :: d_step{ ack[a] && !sack[a] && S==LIVE -> printf("S gets ACK %d\n",a); sack[a]=1; acked() }
active proctype M(){
 do
 :: d_step{ !p0 && S==LIVE -> printf("S Send(0), both cells\n"); p0=1; n0=2; TELL(SLICE) }
 :: d_step{ !p0 && S==LIVE -> printf("S Send(0), cell 0\n"); p0=1; n0=1; TELL(SLICE) }
 :: d_step{ p0 && !p1 && !rev && S==LIVE -> printf("S Send(1, last, empty)\n"); p1=1; told=1; TELL(SLICE+1); acked() }
 :: d_step{ p0 && !rev && S==LIVE -> printf("S Revoke\n"); rev=1; TELL(DROP0); if :: p1 -> TELL(DROP1) :: else fi }
 :: d_step{ rev && !p2 && S==LIVE -> printf("S Send(2, last), both cells\n"); p2=1; n2=2; told=1; TELL(SLICE+2) }
 :: d_step{ rev && !p2 && S==LIVE -> printf("S Send(2, last), cell 0\n"); p2=1; n2=1; told=1; TELL(SLICE+2) }
 :: d_step{ rev && !p2 && S==LIVE -> printf("S Send(2, last), nothing\n"); p2=1; n2=0; told=1; TELL(SLICE+2) }
 BRINGS(0,0,0,n0,!rev) BRINGS(1,0,1,n0,!rev) BRINGS(3,2,0,n2,p2) BRINGS(4,2,1,n2,p2)
 ACK(0) ACK(1) ACK(2) ACK(3) ACK(4)
 :: d_step{ len(c0)>0 && !rdn -> c0?m; hear(m); m=0 }
 :: d_step{ len(c1)>0 -> c1?m; hear(m); m=0 }
 :: d_step{ len(c0)>0 && brk -> printf("lane 0: rest lost\n"); do :: len(c0)>0 -> c0?k :: else -> break od; k=0 }
 :: d_step{ mERC && S==LIVE -> printf("S gets END(COMPLETED)\n");
#ifdef V_EARLYCOMPL
      endS(WELL,0)
#else
      if :: told -> endS(WELL,0) :: else -> endS(FAIL,PROTO) fi
#endif
    }
 :: d_step{ mERF && S==LIVE -> printf("S gets END of R\n"); endS(FAIL,rwhy) }
 :: d_step{ !brk -> brk=1; printf("lane 0 breaks\n") }
 :: d_step{ brk && !sdn && S!=LIED -> sdn=1; printf("S resync\n"); if :: rev -> c1!DROP0; if :: p1 -> c1!DROP1 :: else fi :: !rev && p0 -> c1!SLICE :: else fi;
      if :: p1 && !rev -> c1!SLICE+1 :: else fi; if :: p2 -> c1!SLICE+2 :: else fi;
      if :: S==WELL -> c1!ENDWELL :: S==FAIL && swhy==NOTOFF -> c1!ENDNOTOFF :: S==FAIL && swhy!=NOTOFF -> c1!ENDPROTO :: else fi }
 :: d_step{ brk && !rdn -> rdn=1; printf("R sees lane 0 down\n") }
#if LIAR==1
 :: d_step{ R==LIVE -> printf("R lies: END(COMPLETED)\n"); R=LIED; mERC=1 }
#endif
#if LIAR==2
 :: d_step{ S==LIVE && !sdn && !brk -> printf("S lies: END(DELIVERED)\n"); S=LIED; c1!ENDWELL }
#endif
 :: else -> break
 od;
 skip; d_step{ printf("END S=%d (%d) R=%d (%d) cells %d %d\n",S,swhy,R,rwhy,cell[0],cell[1]);
 assert(S>=WELL && R>=WELL);
 if :: R==WELL -> assert(cell[0]!=0 && cell[0]==cell[1]) :: else fi;
 if :: S==WELL -> assert(told && R!=FAIL) :: else fi;
 if :: R==WELL && S!=LIED -> assert(S==WELL) :: else fi;
 /* Between honest ones it ends well, or both say why: somebody has left out what was needed. */
 if :: LIAR==0 && S!=WELL -> assert(S==FAIL && R==FAIL && swhy==NOTOFF && rwhy==NOTOFF && ((p1 && n0<2) || (p2 && n2<2))) :: else fi }
}
