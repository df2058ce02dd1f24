/* The control lane. Side A tells side B the facts 0 ... N-1 in order, each of which makes sense only
 * after the one before (PULL and then UPDATE, DROP and then the new SLICE, CLAIM and then DECLINE),
 * and waits until B has applied them all.
 *
 * There are lanes 0 and 1, and lane 0 of the next epoch, which does not break. Numbers count for each
 * lane and epoch. On a lane messages may be reordered; a later one is held until the gap before it is
 * filled, at most HOLD of them. A new control lane begins with a resync of all facts.
 *
 * BREAK n  n lanes may break: what is on them may be lost, and each side notices for itself
 * GAP n    n messages vanish while their lane stays up (a wrong tag, a send that was refused) and
 *          goes on answering pings
 * DRAIN    instead of the above: the answer DRAINED of a mapped arena. B ends its leg, A answers
 *          DRAINED on its own control lane when its gather has ended, and B's region waits for it
 *
 * V_NOGAPTIMER a gap may last as long as the lane answers pings (it has a time limit of its own)
 * V_NUMBERS    a new lane goes on with the numbers of the old one (each lane and epoch begins anew)
 * V_NORESYNC   a new control lane begins without a resync
 * V_UNORDERED  nothing is held: messages are applied as they come
 * V_STICKY     a repeated fact undoes a later one (CLAIM after DECLINE, SLICE after DROP)
 * V_DRAINONCE  END is repeated only until the other side's END has been seen (until DRAINED has)
 * V_DRAINSYNC  DRAINED is left out of the resync
 */
#ifndef N
#define N 3
#endif
#ifndef HOLD
#define HOLD 2
#endif
#ifndef BREAK
#define BREAK 1
#endif
#ifndef GAP
#define GAP 1
#endif
#define NLN 3                    /* lane 0, lane 1, lane 0 in its next epoch (does not break) */
byte said, cur;                  /* A: facts that exist, its control lane */
byte nx[NLN], fst[NLN];          /* A: messages sent on that lane (message m of a lane is fact m: the resync repeats all facts from 0) ; V_NUMBERS: first number */
bit fly[9], hl[9];               /* on the way, held: lane*3+m */
byte want[NLN];                  /* B: next number it wants of that lane */
bit bk[2], adn[2], bdn[2]; byte gaps, ap; bit und;
hidden byte i, j;
#define X(l,m) ((l)*3+(m))
inline say(l){ /* A sends the next fact on lane l */ fly[X(l,nx[l])]=1; nx[l]++ }
inline apply(f){ if :: f==ap -> ap++; printf("B applies fact %d\n",f) :: f<ap -> printf("B: fact %d again\n",f);
#ifdef V_STICKY
   if :: f+1<ap -> und=1 :: else fi
#endif
   :: else -> printf("B: fact %d without the one before\n",f); assert(0) fi }
inline take(l){ /* B takes what is in order on lane l */ for (i : 0 .. N-1) { if :: hl[X(l,i)] && want[l]==i -> hl[X(l,i)]=0; want[l]++; apply(i) :: else fi }; i=0 }
#define HELD(l) (hl[X(l,0)]+hl[X(l,1)]+hl[X(l,2)])
#define MSG(l,m) \
 :: d_step{ fly[X(l,m)] && !BD(l) -> fly[X(l,m)]=0; RECV(l,m) } \
 :: d_step{ fly[X(l,m)] && BRK(l) -> fly[X(l,m)]=0; printf("lost: lane %d fact %d\n",l,m) } \
 :: d_step{ fly[X(l,m)] && gaps<GAP && l<2 -> gaps++; fly[X(l,m)]=0; printf("vanishes, lane %d up: fact %d\n",l,m) }
#ifdef V_UNORDERED
#define RECV(l,m) apply(m)
#else
#define RECV(l,m) hl[X(l,m)]=1; take(l)
#endif
#define BD(l) ((l)<2 && bdn[(l)&1])
#define AD(l) ((l)<2 && adn[(l)&1])
#define BRK(l) ((l)<2 && bk[(l)&1])
#ifdef V_NUMBERS
#define WANT0(l) /* B waits for number 0, A goes on where it was */ for (j : 0 .. 0) { nx[l]=nx[l-1] }; if :: nx[l]<N -> skip :: else fi
#else
#define WANT0(l) nx[l]=0
#endif
#define LANES(l) \
 :: d_step{ !bk[l] && BREAK>bk[0]+bk[1] -> bk[l]=1; printf("lane %d breaks\n",l) } \
 :: d_step{ !adn[l] && cur==l && (bk[l] || bdn[l]) -> adn[l]=1; cur=l+1; printf("A gives up lane %d, resync on %d\n",l,l+1); WANT0(l+1); RESYNC(l+1) } \
 :: d_step{ !bdn[l] && (bk[l] || adn[l]) -> bdn[l]=1; printf("B gives up lane %d\n",l); for (i : 0 .. N-1) { hl[X(l,i)]=0 }; i=0 } \
 GT(l)
#ifdef V_NORESYNC
#define RESYNC(l) nx[l]=said
#else
#define RESYNC(l) for (i : 0 .. N-1) { if :: i<said && nx[l]<said -> say(l) :: else fi }; i=0
#endif
#ifdef V_NOGAPTIMER
#define GT(l)
#else
#define GT(l) :: d_step{ !bdn[l] && !adn[l] && want[l]<nx[l] && !fly[X(l,want[l])] && cur==l -> bdn[l]=1; printf("B: gap on lane %d not filled in time: lane down, LANEDOWN\n",l); for (i : 0 .. N-1) { hl[X(l,i)]=0 }; i=0 }
#endif
#ifdef DRAIN
byte eR; bit eS, dr, gath=1, seenE; bit fE[2], fS[2], fD[2]; bit b2, sw, rw; /* END of R, END of S, DRAINED per lane */
active proctype M(){
 do
 :: d_step{ eR==0 -> eR=1; fE[rw]=1; printf("R END\n") }
 :: d_step{ fE[0]||fE[1] -> fE[0]=0; fE[1]=0; seenE=1; if :: !eS -> eS=1; fS[sw]=1 :: else fi; printf("S gets END\n"); if :: !gath -> fD[sw]=1 :: else fi }
 :: d_step{ !eS -> eS=1; fS[sw]=1; printf("S ends by itself\n") }
 :: d_step{ gath -> gath=0; printf("gather ends\n"); if :: seenE -> fD[sw]=1 :: else fi }
 :: d_step{ (fS[0]||fS[1]) && eR<3 && eR>0 -> fS[0]=0; fS[1]=0; eR=2; printf("R gets END of S\n") }
 :: d_step{ (fD[0]||fD[1]) && !dr -> dr=1; eR=3; printf("R gets DRAINED\n") }
 :: d_step{ !b2 -> b2=1; printf("lane breaks\n") }
 :: d_step{ b2 && fE[0] -> fE[0]=0; printf("END lost\n") }
 :: d_step{ b2 && fS[0] -> fS[0]=0; printf("END of S lost\n") }
 :: d_step{ b2 && fD[0] -> fD[0]=0; printf("DRAINED lost\n") }
 :: d_step{ b2 && !sw && !fE[0] -> sw=1; printf("S resync\n"); if :: eS -> fS[1]=1 :: else fi;
#ifndef V_DRAINSYNC
   if :: seenE && !gath -> fD[1]=1 :: else fi
#else
   skip
#endif
   }
#ifdef V_DRAINONCE
 :: d_step{ b2 && !rw && !fS[0] && !fD[0] -> rw=1; printf("R resync\n"); if :: eR==1 -> fE[1]=1 :: else fi }
#else
 :: d_step{ b2 && !rw && !fS[0] && !fD[0] -> rw=1; printf("R resync\n"); if :: eR>0 && !dr -> fE[1]=1 :: else fi }
#endif
 :: else -> break
 od; skip; d_step{ printf("END eR=%d dr=%d\n",eR,dr); assert(dr) } }
#else
active proctype M(){
 do
 :: d_step{ said<N -> said++; printf("A: fact %d on lane %d\n",said-1,cur); if :: nx[cur]<N -> say(cur) :: else fi }
 MSG(0,0) MSG(0,1) MSG(0,2) MSG(1,0) MSG(1,1) MSG(1,2) MSG(2,0) MSG(2,1) MSG(2,2)
 LANES(0) LANES(1)
 :: d_step{ cur<2 && HELD(cur)>HOLD && !bdn[cur] -> bdn[cur]=1; printf("B: too many held, lane %d down\n",cur) }
 :: else -> break
 od;
 skip; d_step{ printf("END ap=%d said=%d cur=%d\n",ap,said,cur); assert(said==N && ap==N); assert(!und) } }
#endif
