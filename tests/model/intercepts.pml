/* Written by tests/model/promela.py from tests/model/transitions/table.py: edit that.
   A page set is a bit mask. The world: 2 pages, 1 VPs, 1 source(s) of invalidations, a region manager, a VMM. */
#define LOCK_FREE 0
#define LOCK_VP 1
#define LOCK_MANAGER 2
#define LOCK_REMOVER 3
#define LOCK_CHANGER 4
#define PHASE_IDLE 0
#define PHASE_RESOLVING 1
#define PHASE_RESOLVED 2
#define PHASE_MAPPING 3
#define RELIANCE_FRESH 0
#define RELIANCE_STALE 1
#define NOTICE_NONE 0
#define NOTICE_BEGUN 1
#define NOTICE_OPEN 2
#define NOTICE_GONE 3
#define NOTICE_TOLD 4
#define BATCH_DONE 0
#define BATCH_PENDING 1
#define BATCH_SERVING 2

#define EVERYTHING 3
#define WITHIN(part, whole) (((part) & ~(whole)) == 0)
#define MEET(left, right) (((left) & (right)) != 0)

byte lock = LOCK_FREE;
byte region = 0;
byte covered = 0;
byte turning = 0;
byte backed = EVERYTHING;
byte record = 0;
byte changing = 0;
byte reached = 0;
byte old = 0;
byte going = 0;
byte serving = 0;
byte known = 0;
byte mistaken = 0;
byte phase[1] = PHASE_IDLE;
byte page[1] = 0;
byte window[1] = 0;
byte reliance[1] = RELIANCE_FRESH;
byte extent[1] = 0;
byte seen[1] = 0;
byte sight[1] = RELIANCE_FRESH;
byte outdated[1] = 0;
byte misseen[1] = 0;
byte notice[1] = NOTICE_NONE;
byte opened[1] = 0;
byte due[1] = 0;
byte batch[1] = BATCH_DONE;

inline keep_promises() {
  assert(WITHIN(old, (due[0])));  /* I1: what the guest reaches of old frames is not acknowledged yet */
  assert(WITHIN(reached, (backed | old)));  /* I2: what the guest reaches is memory */
  assert((WITHIN(reached, region) || lock == LOCK_REMOVER));  /* I2: what the guest reaches lies in the region, unless that is being removed */
  assert(WITHIN(reached, record));  /* I10: what the guest reaches is on record */
  assert(((lock == LOCK_FREE || lock == LOCK_MANAGER || lock == LOCK_REMOVER || lock == LOCK_CHANGER) || (phase[0] == PHASE_MAPPING)));  /* the lock is let go of */
}

inline resume(me, the_page) { d_step {
  WITHIN(the_page, record) && !MEET(the_page, changing) && !MEET(the_page, (going | serving)) ->
  printf("STEP vp %d resume page %d\n", me, the_page);
  assert(WITHIN(the_page, reached));  /* I10: who is told resume reaches it */
  assert(!MEET((the_page & old), (going | serving)));  /* nobody is told resume for what is known to be gone */
  keep_promises()
} }

inline no_region(me, the_page) { d_step {
  !MEET(the_page, region) ->
  printf("STEP vp %d no_region page %d\n", me, the_page);
  assert(!MEET(the_page, covered));  /* P-34: what a region covers before and after a change is said to be in one */
  keep_promises()
} }

inline begin(me, the_page, the_pages) { d_step {
  phase[me] == PHASE_IDLE && WITHIN(the_page, the_pages) && WITHIN(the_pages, region) && !MEET(the_pages, (opened[0])) ->
  printf("STEP vp %d begin page %d pages %d\n", me, the_page, the_pages);
  phase[me] = PHASE_RESOLVING;
  page[me] = the_page;
  window[me] = the_pages;
  reliance[me] = RELIANCE_FRESH;
  keep_promises()
} }

inline resolve(me, the_found) { d_step {
  phase[me] == PHASE_RESOLVING && WITHIN(the_found, backed) && WITHIN((page[me] & backed), the_found) ->
  printf("STEP vp %d resolve found %d\n", me, the_found);
  phase[me] = PHASE_RESOLVED;
  extent[me] = (the_found & window[me]);
  seen[me] = (the_found & ~(opened[0]));
  sight[me] = RELIANCE_FRESH;
  misseen[me] = 0;
  keep_promises()
} }

inline learn(me, the_found) { d_step {
  sight[me] == RELIANCE_FRESH && WITHIN(the_found, seen[me]) ->
  printf("STEP vp %d learn found %d\n", me, the_found);
  known = (known | the_found);
  mistaken = ((mistaken & ~the_found) | (the_found & misseen[me]));
  keep_promises()
} }

inline recall(me, the_found) { d_step {
  phase[me] == PHASE_RESOLVING && WITHIN(the_found, (window[me] & known)) && WITHIN(page[me], the_found) ->
  printf("STEP vp %d recall found %d\n", me, the_found);
  phase[me] = PHASE_RESOLVED;
  extent[me] = the_found;
  outdated[me] = (the_found & mistaken);
  keep_promises()
} }

inline forward(me) { d_step {
  phase[me] == PHASE_RESOLVED && !MEET(page[me], extent[me]) && reliance[me] == RELIANCE_FRESH ->
  printf("STEP vp %d forward\n", me);
  assert(!MEET(page[me], backed));  /* forward is said of what is not there */
  assert(!MEET(page[me], (opened[0])));  /* forward is not said of what is being changed */
  phase[me] = PHASE_IDLE;
  window[me] = 0;
  extent[me] = 0;
  outdated[me] = 0;
  keep_promises()
} }

inline give_up(me) { d_step {
  (phase[me] == PHASE_RESOLVING || phase[me] == PHASE_RESOLVED) ->
  printf("STEP vp %d give_up\n", me);
  phase[me] = PHASE_IDLE;
  window[me] = 0;
  extent[me] = 0;
  outdated[me] = 0;
  keep_promises()
} }

inline commit(me) { d_step {
  MEET(page[me], extent[me]) && lock == LOCK_FREE && reliance[me] == RELIANCE_FRESH ->
  printf("STEP vp %d commit\n", me);
  lock = LOCK_VP;
  phase[me] = PHASE_MAPPING;
  keep_promises()
} }

inline map(me, the_pages) { d_step {
  phase[me] == PHASE_MAPPING && WITHIN(changing, 0) && WITHIN(the_pages, (extent[me] & ~record)) ->
  printf("STEP vp %d map pages %d\n", me, the_pages);
  assert(!MEET(the_pages, reached));  /* I9: what is mapped is not mapped again */
  record = (record | the_pages);
  changing = the_pages;
  keep_promises()
} }

inline mapped(me) { d_step {
  phase[me] == PHASE_MAPPING ->
  printf("STEP vp %d mapped\n", me);
  assert(lock == LOCK_VP);  /* I5: the hypervisor is asked, and its answer taken, under the lock */
  reached = (reached | changing);
  old = (old | (changing & outdated[me]));
  keep_promises()
} }

inline map_is_back(me) { d_step {
  phase[me] == PHASE_MAPPING && WITHIN(changing, reached) ->
  printf("STEP vp %d map_is_back\n", me);
  assert(lock == LOCK_VP);  /* I5: the hypervisor is asked, and its answer taken, under the lock */
  changing = 0;
  keep_promises()
} }

inline finish(me) { d_step {
  phase[me] == PHASE_MAPPING && WITHIN(changing, 0) && WITHIN(extent[me], record) ->
  printf("STEP vp %d finish\n", me);
  assert(WITHIN(page[me], reached));  /* I10: who is told mapped reaches it */
  lock = LOCK_FREE;
  phase[me] = PHASE_IDLE;
  window[me] = 0;
  extent[me] = 0;
  outdated[me] = 0;
  keep_promises()
} }

inline begin_invalidation(me, the_pages) { d_step {
  notice[me] == NOTICE_NONE ->
  printf("STEP source %d begin_invalidation pages %d\n", me, the_pages);
  assert(WITHIN((opened[me] | due[me]), 0));  /* a source that begins another invalidation has ended its last one */
  reliance[0] = (MEET(window[0], the_pages) -> RELIANCE_STALE : reliance[0]);
  known = (known & ~the_pages);
  sight[0] = (MEET(seen[0], the_pages) -> RELIANCE_STALE : sight[0]);
  notice[me] = NOTICE_BEGUN;
  opened[me] = the_pages;
  going = (going | the_pages);
  batch[me] = BATCH_PENDING;
  keep_promises()
} }

inline begin_is_acknowledged(me) { d_step {
  notice[me] == NOTICE_BEGUN && batch[me] == BATCH_DONE ->
  printf("STEP source %d begin_is_acknowledged\n", me);
  notice[me] = NOTICE_OPEN;
  keep_promises()
} }

inline change(me, the_found) { d_step {
  notice[me] == NOTICE_OPEN && WITHIN(the_found, opened[me]) ->
  printf("STEP source %d change found %d\n", me, the_found);
  assert(!MEET(reached, opened[me]));  /* I1: memory is changed where the guest does not reach it */
  backed = ((backed & ~opened[me]) | the_found);
  mistaken = (mistaken | (known & opened[me]));
  outdated[0] = (outdated[0] | (extent[0] & opened[me]));
  misseen[0] = (misseen[0] | (seen[0] & opened[me]));
  keep_promises()
} }

inline end_invalidation(me) { d_step {
  (notice[me] == NOTICE_BEGUN || notice[me] == NOTICE_OPEN) ->
  printf("STEP source %d end_invalidation\n", me);
  notice[me] = NOTICE_NONE;
  opened[me] = 0;
  keep_promises()
} }

inline vanish(me, the_pages) { d_step {
  notice[me] == NOTICE_NONE ->
  printf("STEP source %d vanish pages %d\n", me, the_pages);
  notice[me] = NOTICE_GONE;
  due[me] = the_pages;
  backed = (backed & ~the_pages);
  old = (old | (reached & the_pages));
  mistaken = (mistaken | (known & the_pages));
  outdated[0] = (outdated[0] | (extent[0] & the_pages));
  misseen[0] = (misseen[0] | (seen[0] & the_pages));
  keep_promises()
} }

inline tell(me) { d_step {
  notice[me] == NOTICE_GONE ->
  printf("STEP source %d tell\n", me);
  reliance[0] = (MEET(window[0], due[me]) -> RELIANCE_STALE : reliance[0]);
  known = (known & ~due[me]);
  sight[0] = (MEET(seen[0], due[me]) -> RELIANCE_STALE : sight[0]);
  notice[me] = NOTICE_TOLD;
  going = (going | due[me]);
  batch[me] = BATCH_PENDING;
  keep_promises()
} }

inline telling_is_acknowledged(me) { d_step {
  notice[me] == NOTICE_TOLD && batch[me] == BATCH_DONE ->
  printf("STEP source %d telling_is_acknowledged\n", me);
  notice[me] = NOTICE_NONE;
  due[me] = 0;
  keep_promises()
} }

inline take(me) { d_step {
  lock == LOCK_FREE ->
  printf("STEP manager %d take\n", me);
  lock = LOCK_MANAGER;
  serving = going;
  going = 0;
  batch[0] = (batch[0] == BATCH_PENDING -> BATCH_SERVING : batch[0]);
  keep_promises()
} }

inline take_away(me, the_pages) { d_step {
  WITHIN(the_pages, (record & serving)) ->
  printf("STEP manager %d take_away pages %d\n", me, the_pages);
  assert(WITHIN(the_pages, serving));  /* a pass takes away what is going, and nothing else */
  changing = the_pages;
  keep_promises()
} }

inline taken_away(me) { d_step {
  lock == LOCK_MANAGER ->
  printf("STEP manager %d taken_away\n", me);
  assert(lock == LOCK_MANAGER);  /* I5: the hypervisor is asked, and its answer taken, under the lock */
  reached = (reached & ~changing);
  old = (old & ~changing);
  keep_promises()
} }

inline take_away_is_back(me) { d_step {
  lock == LOCK_MANAGER && !MEET(changing, reached) ->
  printf("STEP manager %d take_away_is_back\n", me);
  assert(lock == LOCK_MANAGER);  /* I5: the hypervisor is asked, and its answer taken, under the lock */
  record = (record & ~changing);
  changing = 0;
  keep_promises()
} }

inline served(me) { d_step {
  lock == LOCK_MANAGER && !MEET(record, serving) ->
  printf("STEP manager %d served\n", me);
  batch[0] = (batch[0] == BATCH_SERVING -> BATCH_DONE : batch[0]);
  serving = 0;
  lock = LOCK_FREE;
  keep_promises()
} }

inline remove(me) { d_step {
  lock == LOCK_FREE ->
  printf("STEP vmm %d remove\n", me);
  lock = LOCK_REMOVER;
  reliance[0] = (MEET(window[0], region) -> RELIANCE_STALE : reliance[0]);
  known = (known & ~region);
  region = 0;
  keep_promises()
} }

inline unmap(me, the_pages) { d_step {
  (lock == LOCK_REMOVER || WITHIN(the_pages, turning)) && WITHIN(changing, 0) && WITHIN(the_pages, record) ->
  printf("STEP vmm %d unmap pages %d\n", me, the_pages);
  assert((lock == LOCK_REMOVER || WITHIN(the_pages, turning)));  /* P-34: a change takes away what it turns, and nothing else */
  changing = the_pages;
  keep_promises()
} }

inline unmapped(me) { d_step {
  (lock == LOCK_REMOVER || lock == LOCK_CHANGER) ->
  printf("STEP vmm %d unmapped\n", me);
  assert((lock == LOCK_REMOVER || lock == LOCK_CHANGER));  /* I5: the hypervisor is asked, and its answer taken, under the lock */
  reached = (reached & ~changing);
  old = (old & ~changing);
  keep_promises()
} }

inline unmap_is_back(me) { d_step {
  (lock == LOCK_REMOVER || lock == LOCK_CHANGER) && !MEET(changing, reached) ->
  printf("STEP vmm %d unmap_is_back\n", me);
  assert((lock == LOCK_REMOVER || lock == LOCK_CHANGER));  /* I5: the hypervisor is asked, and its answer taken, under the lock */
  record = (record & ~changing);
  changing = 0;
  keep_promises()
} }

inline removed(me) { d_step {
  lock == LOCK_REMOVER && WITHIN(record, 0) ->
  printf("STEP vmm %d removed\n", me);
  lock = LOCK_FREE;
  keep_promises()
} }

inline add(me) { d_step {
  lock == LOCK_FREE && WITHIN(region, 0) ->
  printf("STEP vmm %d add\n", me);
  assert(WITHIN(reached, 0));  /* a region is added where nothing of another is left */
  region = EVERYTHING;
  keep_promises()
} }

inline change_regions(me, the_pages, the_kept) { d_step {
  lock == LOCK_FREE && WITHIN(the_kept, region) && WITHIN((region & ~the_pages), the_kept) ->
  printf("STEP vmm %d change_regions pages %d kept %d\n", me, the_pages, the_kept);
  lock = LOCK_CHANGER;
  turning = the_pages;
  covered = the_kept;
  keep_promises()
} }

inline exchange(me, the_found) { d_step {
  lock == LOCK_CHANGER && !MEET(record, turning) && WITHIN(covered, the_found) ->
  printf("STEP vmm %d exchange found %d\n", me, the_found);
  assert(WITHIN(reached, (region & ~turning)));  /* P-34: regions are exchanged where nothing is left of what turns */
  reliance[0] = (MEET(window[0], region) -> RELIANCE_STALE : reliance[0]);
  known = (known & ~region);
  region = the_found;
  keep_promises()
} }

inline changed(me) { d_step {
  lock == LOCK_CHANGER && !MEET(record, turning) ->
  printf("STEP vmm %d changed\n", me);
  lock = LOCK_FREE;
  turning = 0;
  covered = 0;
  keep_promises()
} }

active proctype vp_0() { do
  :: resume(0, 1)
  :: resume(0, 2)
  :: no_region(0, 1)
  :: no_region(0, 2)
  :: begin(0, 1, 1)
  :: begin(0, 1, 2)
  :: begin(0, 1, 3)
  :: begin(0, 2, 1)
  :: begin(0, 2, 2)
  :: begin(0, 2, 3)
  :: resolve(0, 0)
  :: resolve(0, 1)
  :: resolve(0, 2)
  :: resolve(0, 3)
  :: learn(0, 0)
  :: learn(0, 1)
  :: learn(0, 2)
  :: learn(0, 3)
  :: recall(0, 0)
  :: recall(0, 1)
  :: recall(0, 2)
  :: recall(0, 3)
  :: forward(0)
  :: give_up(0)
  :: commit(0)
  :: map(0, 1)
  :: map(0, 2)
  :: map(0, 3)
  :: mapped(0)
  :: map_is_back(0)
  :: finish(0)
od }

active proctype source_0() { do
  :: begin_invalidation(0, 1)
  :: begin_invalidation(0, 2)
  :: begin_invalidation(0, 3)
  :: begin_is_acknowledged(0)
  :: change(0, 0)
  :: change(0, 1)
  :: change(0, 2)
  :: change(0, 3)
  :: end_invalidation(0)
  :: vanish(0, 1)
  :: vanish(0, 2)
  :: vanish(0, 3)
  :: tell(0)
  :: telling_is_acknowledged(0)
od }

active proctype manager_0() { do
  :: take(0)
  :: take_away(0, 1)
  :: take_away(0, 2)
  :: take_away(0, 3)
  :: taken_away(0)
  :: take_away_is_back(0)
  :: served(0)
od }

active proctype vmm_0() { do
  :: remove(0)
  :: unmap(0, 1)
  :: unmap(0, 2)
  :: unmap(0, 3)
  :: unmapped(0)
  :: unmap_is_back(0)
  :: removed(0)
  :: add(0)
  :: change_regions(0, 1, 0)
  :: change_regions(0, 1, 1)
  :: change_regions(0, 1, 2)
  :: change_regions(0, 1, 3)
  :: change_regions(0, 2, 0)
  :: change_regions(0, 2, 1)
  :: change_regions(0, 2, 2)
  :: change_regions(0, 2, 3)
  :: change_regions(0, 3, 0)
  :: change_regions(0, 3, 1)
  :: change_regions(0, 3, 2)
  :: change_regions(0, 3, 3)
  :: exchange(0, 0)
  :: exchange(0, 1)
  :: exchange(0, 2)
  :: exchange(0, 3)
  :: changed(0)
od }
