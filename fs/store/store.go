// Package store keeps objects on disk: the contents of files, each once per node
// however many images hold it.
//
// What goes in has been verified: a store never sees bytes that were not checked against the
// object's key, and so nobody who reads from it ever asks. What comes out are plain
// files under Objects, which overlayfs reads by itself.
//
//	objects/a/bcdef…   complete objects, named by their key, read-only
//	partial/abcdef…    objects that are being fetched: a sparse file, and beside it
//	partial/abcdef….in  which of its chunks are in
//	layers/, meta/     what others keep beside the objects (see [Store.Path])
//	tmp/               files that have no name yet; emptied at [Open]
//
// Everything gets its name by a rename after it is complete, so a process that is killed leaves
// nothing half-made. A power cut is another matter: the kernel may have renamed
// a file whose bytes it had not written. The store notes when it last made the disk
// catch up (syncfs), and after a boot throws away what was written since then.
//
// Several processes may use one store at the same time. A Store may be used by several goroutines.
package store

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Key is the name of an object: a digest over its content, made by the caller.
type Key [32]byte

// String returns the key as 64 hexadecimal digits.
func (k Key) String() string { return hex.EncodeToString(k[:]) }

// folders is how many folders objects are spread over, by the first digit of their keys: few, so that what a
// start looks up is near together on a disk that was not read before, and enough for
// 10^8 objects, where ext4's directories have room for 10^7 names.
const folders = 16

// Path returns the object's name below the objects folder, "a/bcdef…".
func (k Key) Path() string {
	s := k.String()
	return s[:1] + "/" + s[1:]
}

// A Store is one folder of objects.
type Store struct {
	dir     string
	log     *slog.Logger
	inUse   *os.File // holds a shared lock on the store while it is open
	dirty   atomic.Bool
	stop    chan struct{}
	stopped sync.WaitGroup
}

// syncEvery is how long an object may lie in the store before the disk is made to hold it.
const syncEvery = 30 * time.Second

// Open opens the store in dir, which is made if it is not there. A nil logger is silent.
func Open(dir string, log *slog.Logger) (*Store, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	for _, sub := range []string{"objects", "partial", "layers", "meta", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	// overlayfs looks objects up on behalf of every user of a container.
	if err := os.Chmod(filepath.Join(dir, "objects"), 0o755); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	for i := range folders {
		if err := os.Mkdir(filepath.Join(dir, "objects", fmt.Sprintf("%x", i)), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	s := &Store{dir: dir, log: log, stop: make(chan struct{})}
	if err := s.lock(); err != nil {
		return nil, fmt.Errorf("store: %s: %w", dir, err)
	}
	s.stopped.Go(s.syncLoop)
	return s, nil
}

// lock takes the store's shared lock. The process that finds nobody else there
// first cleans up what the last ones left.
func (s *Store) lock() error {
	f, err := os.OpenFile(filepath.Join(s.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	s.inUse = f
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		if err := s.recover(); err != nil {
			f.Close()
			return err
		}
	}
	// Going from exclusive to shared is not atomic: another process may recover between the
	// two. It finds nothing to do then.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		f.Close()
		return err
	}
	return nil
}

// Path returns the path of a file or folder of the store, for those who keep something in layers/ or meta/.
func (s *Store) Path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// Objects is the folder of complete objects.
func (s *Store) Objects() string { return filepath.Join(s.dir, "objects") }

// Close ends the use of the store. It does not wait for the disk.
func (s *Store) Close() error {
	close(s.stop)
	s.stopped.Wait()
	return s.inUse.Close()
}

// Has reports whether the object is complete.
func (s *Store) Has(key Key) bool {
	var st unix.Stat_t
	return unix.Stat(filepath.Join(s.dir, "objects", key.Path()), &st) == nil
}

// OpenObject opens a complete object; an error wraps fs.ErrNotExist if it is not here.
func (s *Store) OpenObject(key Key) (*os.File, error) {
	return os.Open(filepath.Join(s.dir, "objects", key.Path()))
}

// Put stores an object whose content is p. An object that is there already stays.
func (s *Store) Put(key Key, p []byte) error {
	t, err := s.Create()
	if err != nil {
		return err
	}
	defer t.Discard()
	if _, err := t.Write(p); err != nil {
		return err
	}
	return t.Publish(key)
}

// WriteFile writes a file of layers/ or meta/ (elem below the store) under a temporary name and
// renames it, so that it is there whole or not at all.
func (s *Store) WriteFile(write func(f *os.File) error, elem ...string) error {
	t, err := s.Create()
	if err != nil {
		return err
	}
	defer t.Discard()
	if err := write(t.f); err != nil {
		return err
	}
	defer s.dirty.Store(true)
	return t.rename(s.Path(elem...))
}

// A Temp is a file of the store that has no name yet.
type Temp struct {
	s    *Store
	f    *os.File
	name string
}

// Temporary files are named after the process and numbered. A process id would not do: two processes in
// different PID namespaces may have the same.
var (
	tempPrefix = rand.Text()
	tempNames  atomic.Uint64
)

func (s *Store) tempName() string {
	return filepath.Join(s.dir, "tmp", fmt.Sprintf("%s.%d", tempPrefix, tempNames.Add(1)))
}

// Create makes a file that becomes an object at [Temp.Publish], or vanishes at [Temp.Discard].
func (s *Store) Create() (*Temp, error) {
	name := s.tempName()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o444)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return &Temp{s, f, name}, nil
}

// Adopt takes a file away from where it is, name in the folder dir (a descriptor, O_PATH is enough), and makes it a
// file of the store, that becomes an object at [Temp.Publish], or vanishes at [Temp.Discard]. Nothing can
// be written to it. Its owner, mode and xattrs become those of an object.
//
// f is that file, open, and stays the caller's. It is a regular file with this one name, and the caller knows that
// nobody else has it open. After an error the file may have lost its attributes, and, if it is not f that had the name, its name; f can
// still be read. It wraps unix.EXDEV if the store is on another file system.
func (s *Store) Adopt(f *os.File, dir int, name string) (*Temp, error) {
	fd := int(f.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("store: stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		return nil, fmt.Errorf("store: %q: not a regular file with one name", name)
	}
	if err := strip(fd); err != nil {
		return nil, fmt.Errorf("store: %q: %w", name, err)
	}
	t := &Temp{s: s, name: s.tempName()}
	if err := unix.Renameat(dir, name, unix.AT_FDCWD, t.name); err != nil {
		return nil, fmt.Errorf("store: rename %q: %w", name, err)
	}
	var renamed unix.Stat_t
	if err := unix.Lstat(t.name, &renamed); err != nil || renamed.Dev != st.Dev || renamed.Ino != st.Ino {
		t.Discard()
		return nil, fmt.Errorf("store: %q: another file took its place", name)
	}
	return t, nil
}

// strip gives a file the attributes of an object.
func strip(fd int) error {
	if err := unix.Fchown(fd, os.Geteuid(), os.Getegid()); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if n, err := unix.Flistxattr(fd, nil); err == nil && n > 0 {
		list := make([]byte, n)
		if n, err = unix.Flistxattr(fd, list); err != nil {
			return fmt.Errorf("list of xattrs: %w", err)
		}
		for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
			if err := unix.Fremovexattr(fd, name); err != nil {
				return fmt.Errorf("remove xattr %s: %w", name, err)
			}
		}
	}
	// Last: an ACL that goes changes the mode.
	if err := unix.Fchmod(fd, 0o444); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	return nil
}

// Write appends verified bytes.
func (t *Temp) Write(p []byte) (int, error) { return t.f.Write(p) }

// WriteHole appends n zero bytes without storing them.
func (t *Temp) WriteHole(n int64) error {
	at, err := t.f.Seek(n, 1)
	if err != nil {
		return err
	}
	return t.f.Truncate(at)
}

// Publish makes the file the object named key. The caller has checked that its bytes are those that key names. An
// object that is there already stays.
func (t *Temp) Publish(key Key) error {
	if t.s.Has(key) {
		return nil
	}
	defer t.s.dirty.Store(true)
	return t.rename(filepath.Join(t.s.dir, "objects", key.Path()))
}

func (t *Temp) rename(path string) error {
	if err := os.Rename(t.name, path); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	t.name = ""
	return nil
}

// Discard closes the file, and removes it if it was not published.
func (t *Temp) Discard() {
	t.f.Close()
	if t.name != "" {
		os.Remove(t.name)
	}
}

// A syncPoint says what is known to be on disk.
type syncPoint struct {
	Boot  string    `json:"boot"`  // the kernel's boot id when it was written
	Until time.Time `json:"until"` // everything older than this is on disk
}

// bootID tells one run of the kernel from the next.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(bytes.TrimSpace(b))
}

// sync makes the disk hold everything that is in the store, and notes that it does.
func (s *Store) sync() error {
	until := time.Now()
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return err
	}
	return s.writeSyncPoint(until)
}

func (s *Store) writeSyncPoint(until time.Time) error {
	b, _ := json.Marshal(syncPoint{bootID(), until})
	t, err := s.Create()
	if err != nil {
		return err
	}
	defer t.Discard()
	if _, err := t.Write(b); err != nil {
		return err
	}
	if err := t.f.Sync(); err != nil {
		return err
	}
	return t.rename(s.Path("synced"))
}

func (s *Store) syncLoop() {
	tick := time.NewTicker(syncEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
		if s.dirty.Swap(false) {
			if err := s.sync(); err != nil {
				s.dirty.Store(true)
				s.log.Warn("store: cannot sync", "dir", s.dir, "err", err)
			}
		}
	}
}

// recover runs when nobody else uses the store: it empties tmp, and after a boot removes
// what may not have reached the disk before the last one ended.
func (s *Store) recover() error {
	tmp, err := os.ReadDir(s.Path("tmp"))
	if err != nil {
		return err
	}
	for _, e := range tmp {
		os.Remove(s.Path("tmp", e.Name()))
	}
	var last syncPoint
	if b, err := os.ReadFile(s.Path("synced")); err == nil {
		json.Unmarshal(b, &last) // a damaged file means that nothing is known
	}
	if last.Boot == bootID() && last.Boot != "" {
		return nil
	}
	removed, err := s.removeSince(last.Until)
	if err != nil {
		return err
	}
	if removed > 0 {
		s.log.Warn("store: the machine stopped before these files were known to be on disk: removed", "files", removed, "dir", s.dir)
	}
	return s.writeSyncPoint(time.Now())
}

// removeSince removes every file whose inode changed after, or within two seconds before, until: the time of a
// change is set by the kernel, and on disk it stands in the same journal entry as the name and the size.
func (s *Store) removeSince(until time.Time) (int, error) {
	until = until.Add(-2 * time.Second)
	removed := 0
	for _, sub := range []string{"objects", "partial", "layers", "meta"} {
		err := filepath.WalkDir(s.Path(sub), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return err
			}
			if time.Unix(st.Ctim.Unix()).Before(until) {
				return nil
			}
			removed++
			return os.Remove(path)
		})
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}

// Here returns how many of an object's size bytes are in the store.
func (s *Store) Here(key Key, size int64) int64 {
	if s.Has(key) {
		return size
	}
	var st unix.Stat_t
	if unix.Stat(s.Path("partial", key.String()), &st) != nil {
		return 0
	}
	return min(st.Blocks*512, size)
}

// A file is an object's file, as each sees it.
type file struct {
	path string
	key  Key
	size int64     // of disk, in bytes
	used time.Time // last, as far as the file system notes it
}

// each calls f for every file of an object, complete or not, until f returns an error.
func (s *Store) each(f func(file) error) error {
	visit := func(dir, name, hexKey string) error {
		x := file{path: s.Path(dir, name)}
		if n, err := hex.Decode(x.key[:], []byte(hexKey)); err != nil || n != len(x.key) {
			return nil // not an object's name
		}
		var st unix.Stat_t
		if err := unix.Lstat(x.path, &st); err != nil {
			return ignoreNotExist(err) // another process prunes too, or has just published it
		}
		x.size, x.used = st.Blocks*512, time.Unix(max(st.Atim.Sec, st.Ctim.Sec), 0)
		return f(x)
	}
	for i := range folders {
		prefix := fmt.Sprintf("%x", i)
		entries, err := os.ReadDir(s.Path("objects", prefix))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if len(e.Name()) != 2*len(Key{})-1 {
				continue
			}
			if err := visit(filepath.Join("objects", prefix), e.Name(), prefix+e.Name()); err != nil {
				return err
			}
		}
	}
	entries, err := os.ReadDir(s.Path("partial"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if len(e.Name()) < 2*len(Key{}) {
			continue
		}
		if err := visit("partial", e.Name(), e.Name()[:2*len(Key{})]); err != nil {
			return err
		}
	}
	return nil
}

// Size returns how many bytes of disk the objects take, complete or not.
func (s *Store) Size() (size int64, err error) {
	err = s.each(func(f file) error { size += f.size; return nil })
	return size, err
}

// Prune removes every object that keep does not want, complete or not, and returns the bytes of disk that became free. Nobody
// may be fetching an object that keep does not want.
func (s *Store) Prune(keep func(Key) bool) (freed int64, err error) {
	return s.Evict(keep, -1)
}

// Evict is Prune that ends when enough bytes of disk became free, and begins with what was not used for longest. A negative
// enough is never enough.
func (s *Store) Evict(keep func(Key) bool, enough int64) (freed int64, err error) {
	var files []file
	err = s.each(func(f file) error {
		if !keep(f.key) {
			files = append(files, f)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	slices.SortFunc(files, func(a, b file) int { return a.used.Compare(b.used) })
	for _, f := range files {
		if enough >= 0 && freed >= enough {
			break
		}
		if err := os.Remove(f.path); err != nil {
			if ignoreNotExist(err) != nil {
				return freed, err
			}
			continue
		}
		freed += f.size
	}
	return freed, nil
}

// Sync makes the disk hold everything that is in the store.
func (s *Store) Sync() error { return s.sync() }

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
