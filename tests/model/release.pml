/* A receiver that does not know which data-parallel group holds its transfer asks all. Groups 0 and 1
 * of one sender rank each (s), receiver ranks 0 and 1 (g), leg s*2+g. Group 1 has the transfer, group
 * 0 perhaps too. The first SLICE decides for that receiver rank; its other leg gets END(RELEASED).
 *
 * BOTH     group 0 has the transfer too
 * LOSS     a lane breaks
 * CRASH    the daemon of group 0 dies
 * CANC     group 0's send is cancelled (with BOTH)
 * WAITOUT  a PULL that waits for its Send at group 0 runs out: END(NO_SEND)
 *
 * V_RELFAIL   END(RELEASED) fails the send (it is no failure)
 * V_BORNREL   END(RELEASED) is remembered against a later Send
 * V_DEADGROUP the dead link or NO_SEND of one group fails the receiver (only that of the last one left)
 * V_RELEND    an END of a leg that was already released fails the receiver
 * V_RELLOST   END(RELEASED) is left out of the resync
 * V_SWITCH    a later SLICE of the other group is taken too
 * V_ALLREL    a send all of whose legs were released reports DELIVERED
 */
#ifndef LOSS
#define LOSS 0
#endif
#ifndef CRASH
#define CRASH 0
#endif
byte snd[2]; /* 0 none 1 open 2 DELIVERED 3 FAILED 4 CANCELLED(RELEASED) 9 dead */
byte lg[4]; /* 0 no PULL 1 parked or open 2 slice sent 4 acked 5 ended 6 released */
byte R[2]; /* 0 idle 2 pulled 3 COMPLETED 4 FAILED */ byte ch[2], from[2]; bit out[4]; /* leg dropped or released at R */
bit mP[4], mSL[4], mA[4], mREL[4], mER[4], mES[4], mNS[4], brk, rsS, rsR, dead, bornrel[2], canc;
hidden byte i, j, k;
inline term(s){ if :: snd[s]==1 && (lg[(s)*2]>=4) && (lg[(s)*2+1]>=4) && (lg[(s)*2]!=5) && (lg[(s)*2+1]!=5) -> if :: lg[(s)*2]==4 || lg[(s)*2+1]==4 -> snd[s]=2 :: else ->
#ifdef V_ALLREL
   snd[s]=2
#else
   snd[s]=4
#endif
   fi; printf("S%d terminal %d\n",s,snd[s]) :: else fi }
inline failS(s){ snd[s]=3; printf("S%d FAILED\n",s); for (i : 0 .. 1) { if :: lg[(s)*2+i]>=1 && lg[(s)*2+i]<=2 -> lg[(s)*2+i]=5; mES[(s)*2+i]=1 :: else fi }; i=0 }
inline failR(g){ R[g]=4; printf("R%d FAILED\n",g); mER[g]=1; mER[2+(g)]=1 }
#ifdef V_DEADGROUP
#define LOSE(s,g) failR(g)
#else
#define LOSE(s,g) if :: ch[g]==(s)+1 || out[(1-(s))*2+(g)] -> failR(g) :: else -> out[(s)*2+(g)]=1; printf("R%d drops group %d\n",g,s) fi
#endif
#ifdef V_RELEND
#define OUTL(l) 0
#else
#define OUTL(l) out[l]
#endif
#define LEG(s,g,l) \
 :: d_step{ mP[l] && lg[l]==0 && snd[s]<=1 -> printf("S%d gets PULL of %d\n",s,g); lg[l]=1 } \
 :: d_step{ mP[l] && lg[l]==0 && (snd[s]==2||snd[s]==3||snd[s]==4) -> lg[l]=5; mES[l]=1 } \
 :: d_step{ snd[s]==1 && lg[l]==1 -> printf("S%d SLICE to %d\n",s,g); lg[l]=2; mSL[l]=1 } \
 :: d_step{ mSL[l] && R[g]==2 && ch[g]==0 && !out[l] -> printf("R%d: group %d answers\n",g,s); ch[g]=s+1; from[g]=s; R[g]=3; mA[l]=1; out[(1-(s))*2+(g)]=1; mREL[(1-(s))*2+(g)]=1 } \
 :: d_step{ mSL[l] && R[g]>=3 && (ch[g]!=s+1) && !mREL[l] && lg[l]==2 -> SW(l,g) printf("R%d answers END(RELEASED) to group %d\n",g,s); mREL[l]=1 } \
 :: d_step{ mA[l] && lg[l]==2 -> lg[l]=4; term(s) } \
 :: d_step{ mREL[l] && lg[l]<=2 && snd[s]<9 -> printf("S%d gets END(RELEASED) of %d\n",s,g); lg[l]=6; RELS(s) } \
 :: d_step{ mER[l] && lg[l]<=2 && snd[s]<9 -> printf("S%d gets END of %d\n",s,g); lg[l]=5; if :: snd[s]==1 -> failS(s) :: else fi } \
 :: d_step{ mES[l] && R[g]==2 && !OUTL(l) -> printf("R%d gets END of S%d\n",g,s); failR(g) } \
 :: d_step{ mES[l] && R[g]==3 && ch[g]!=s+1 && RELE -> printf("R%d gets END of released S%d\n",g,s); failR(g) } \
 :: d_step{ mNS[l] && R[g]==2 && !OUTL(l) -> printf("R%d gets END(NO_SEND) of S%d\n",g,s); mNS[l]=0; LOSE(s,g) } \
 :: d_step{ LOSS && brk && !rsR && mREL[l] -> mREL[l]=0; printf("END(RELEASED) lost\n") } \
 :: d_step{ LOSS && brk && !rsR && mP[l] -> mP[l]=0 } :: d_step{ LOSS && brk && !rsR && mA[l] -> mA[l]=0 } :: d_step{ LOSS && brk && !rsS && mSL[l] -> mSL[l]=0 }
#ifdef V_RELEND
#define RELE 1
#else
#define RELE 0
#endif
#define SW(l,g)
#ifdef V_RELFAIL
#define RELS(s) if :: snd[s]==1 -> failS(s) :: else fi
#else
#ifdef V_BORNREL
#define RELS(s) if :: snd[s]==1 -> term(s) :: snd[s]==0 -> bornrel[s]=1 :: else fi
#else
#define RELS(s) term(s)
#endif
#endif
active proctype M(){
 do
 :: d_step{ snd[1]==0 -> snd[1]=1; printf("S1 Send\n"); term(1) }
#ifdef BOTH
 :: d_step{ snd[0]==0 -> snd[0]=1; printf("S0 Send\n"); if :: bornrel[0] -> failS(0) :: else -> term(0) fi }
#endif
 :: d_step{ R[0]==0 -> R[0]=2; mP[0]=1; mP[2]=1; printf("R0 PULLs\n") }
 :: d_step{ R[1]==0 -> R[1]=2; mP[1]=1; mP[3]=1; printf("R1 PULLs\n") }
#ifdef V_SWITCH
 :: d_step{ mSL[0] && R[0]==3 && ch[0]==2 && from[0]!=5 -> from[0]=5 }
#endif
#ifdef CANC
 :: d_step{ snd[0]==1 -> printf("S0 cancel\n"); canc=1; failS(0) }
#endif
 LEG(0,0,0) LEG(0,1,1) LEG(1,0,2) LEG(1,1,3)
#ifdef WAITOUT
 :: d_step{ snd[0]==0 && lg[0]==1 -> lg[0]=5; mNS[0]=1; printf("S0: PULL of 0 ran out\n") }
 :: d_step{ snd[0]==0 && lg[1]==1 -> lg[1]=5; mNS[1]=1; printf("S0: PULL of 1 ran out\n") }
#endif
 :: d_step{ CRASH && !dead && snd[0]!=9 -> snd[0]=9; printf("S0's daemon dies\n"); mSL[0]=0; mSL[1]=0 }
 :: d_step{ snd[0]==9 && !dead && R[0]>0 && R[1]>0 -> dead=1; printf("link to S0 dead\n"); if :: R[0]==2 && !OUTL(0) -> LOSE(0,0) :: else fi; if :: R[1]==2 && !OUTL(1) -> LOSE(0,1) :: else fi }
 :: d_step{ LOSS && !brk -> brk=1; printf("lane breaks\n") }
 :: d_step{ brk && !rsR -> rsR=1; printf("R resync\n"); for (i : 0 .. 3) { j=i%2;
#ifdef V_RELLOST
     if :: R[j]>=2 -> mP[i]=1 :: else fi;
#else
     if :: R[j]>=2 && !out[i] -> mP[i]=1 :: out[i] -> mREL[i]=1 :: else fi;
#endif
     if :: ch[j]==i/2+1 -> mA[i]=1 :: else fi }; i=0 }
 :: d_step{ brk && !rsS -> rsS=1; printf("S resync\n"); for (i : 0 .. 3) { if :: lg[i]==2 && snd[i/2]==1 -> mSL[i]=1 :: else fi }; i=0 }
 :: else -> break
 od;
 skip; d_step { printf("END S=%d,%d R=%d,%d\n",snd[0],snd[1],R[0],R[1]);
 assert(R[0]>=3 && R[1]>=3); assert(snd[1]>=2 || canc); if :: snd[0]==1 -> assert(0) :: else fi;
 if :: !CRASH -> assert((R[0]==3 || canc && ch[0]!=2) && (R[1]==3 || canc && ch[1]!=2)) :: else fi;
#ifndef BOTH
 assert(R[0]==3 && R[1]==3 && snd[1]==2);
 if :: !CRASH -> assert(lg[0]>=5 && lg[1]>=5) :: else fi;
#endif
 for (i : 0 .. 1) { assert(from[i]!=5); if :: snd[i]==2 -> assert((ch[0]==i+1) || (ch[1]==i+1)) :: else fi }; i=0 }
}
