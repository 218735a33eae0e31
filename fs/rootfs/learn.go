package rootfs

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
	"lazuli/fs/pack"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// What a start reads through the object server is what was not complete when it was opened: all of a start of an image that
// nobody knows, and of one with a startup pack what the pack lacks or brings just in time. It is written down for a
// while, and becomes part of a profile that the node keeps for the image's repository and command. The next image of
// that repository has what it needs fetched ahead by its paths.

const (
	// learnQuiet is for how long a start must read nothing to be over. A service that is up may read more, but not soon.
	learnQuiet = 10 * time.Second
	// learnAtMost is how long a start may take from its first read.
	learnAtMost = time.Minute
	// learnPause is for how long nothing must have been started before a start is added to a profile, learnPatience for how long that is
	// waited for.
	learnPause    = 2 * time.Second
	learnPatience = time.Minute
	// maxPieces bounds one profile: 1 GiB of touched files, 2 MiB of text.
	maxPieces = 1 << 14
	// maxProfiles and maxProfileBytes bound what a node keeps: the longest unused go.
	maxProfiles     = 256
	maxProfileBytes = 64 << 20
	// maxKnownPacks is of how many images the node remembers what their packs have: 256 KiB each at most.
	maxKnownPacks = 64
	// configPatience is how long the config of an image is waited for that nobody is waiting for.
	configPatience = time.Minute
)

// A Learned is what a node knows of the starts of a repository's images that have the same command.
type Learned struct {
	Repository string    `json:"repository"`
	Command    []string  `json:"command"` // of the image's config: entrypoint and arguments
	Image      string    `json:"image"`   // that was started last, by its digest
	Starts     int       `json:"starts"`
	Updated    time.Time `json:"updated"`

	Profile *profile.Profile `json:"-"`
}

// A Lesson is a start that was recorded.
type Lesson struct {
	Reference remote.Reference // of the image, by its digest
	Digest    v1.Hash
	Chain     Chain
	Learned   Learned // with the start
	// Packed is how many chunks the startup pack has that the node knows of, Pack its digest, and Missed how many more the start
	// wanted. Without a pack they are zero.
	Pack           v1.Hash
	Packed, Missed int
}

// A knownPack is a startup pack that was looked at.
type knownPack struct {
	digest v1.Hash
	chunks []pack.Chunk // in its order
}

// A learning is what a node has to do with profiles.
type learning struct {
	ctx    context.Context // ends when the node is closed by a daemon
	cancel context.CancelFunc
	work   sync.WaitGroup
	one    sync.Mutex // held while a start is added to a profile: it takes the memory of tables of contents

	mu     sync.Mutex
	starts map[string]*start // by chain
	packs  map[string]knownPack
}

// A start is one that is being recorded.
type start struct {
	recorder *fetch.Recorder
	users    int
	over     chan struct{} // closed when nobody uses the chain any more
}

func (n *Node) profiles() string { return filepath.Join(n.root, "profiles") }

// profilePath is where the profile of a repository and a command lies. The first half of its name is the repository's.
func profilePath(dir, repository string, command []string) string {
	b, _ := json.Marshal(command)
	return filepath.Join(dir, fmt.Sprintf("%s%x.profile", repositoryPrefix(repository), first8(b)))
}

func repositoryPrefix(name string) string { return fmt.Sprintf("%x-", first8([]byte(name))) }

func first8(b []byte) []byte { s := sha256.Sum256(b); return s[:8] }

// commandOf is the command line that an image's config has.
func commandOf(c *v1.ConfigFile) []string {
	return append(slices.Clone(c.Config.Entrypoint), c.Config.Cmd...)
}

// repositoryOf is [repository], independent of the working directory.
func repositoryOf(ref remote.Reference) string {
	if abs, err := ref.Abs(); err == nil {
		ref = abs
	}
	return repository(ref)
}

// Profiles returns what was learned below a root folder of the repository that ref names, the latest first. It is no error
// if that is nothing.
func Profiles(root string, ref remote.Reference) ([]Learned, error) {
	paths, err := filepath.Glob(filepath.Join(root, "profiles", repositoryPrefix(repositoryOf(ref))+"*.profile"))
	if err != nil {
		return nil, err
	}
	var list []Learned
	for _, path := range paths {
		l, err := readLearned(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, *l)
	}
	slices.SortFunc(list, func(a, b Learned) int { return cmp.Compare(b.Updated.UnixNano(), a.Updated.UnixNano()) })
	return list, nil
}

// readLearned reads what [Learned.write] wrote.
func readLearned(path string) (*Learned, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	l := new(Learned)
	line, _, _ := bytes.Cut(b, []byte("\n"))
	if err = json.Unmarshal(bytes.TrimPrefix(line, []byte("#")), l); err == nil {
		l.Profile, err = profile.Parse(bytes.NewReader(b))
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: remove it", path, err)
	}
	return l, err
}

// write writes the profile to a file, which has it whole or not at all.
func (l *Learned) write(path string) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "new-") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	head, err := json.Marshal(l)
	if err == nil {
		w := bufio.NewWriter(f)
		fmt.Fprintf(w, "# %s\n", head)
		if _, err = l.Profile.WriteTo(w); err == nil {
			err = w.Flush()
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// boundProfiles removes those that were not written for longest, until the rest is not too many, and what a process that was
// killed has left.
func boundProfiles(dir string, most int, bytes int64) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var files []fs.FileInfo
	for _, e := range entries {
		fi, err := e.Info()
		switch {
		case err != nil:
		case filepath.Ext(e.Name()) == ".profile":
			files = append(files, fi)
		case e.Name() != "lock":
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	sum := int64(0)
	var errs []error
	for i, fi := range files {
		if sum += fi.Size(); i >= most || sum > bytes {
			errs = append(errs, os.Remove(filepath.Join(dir, fi.Name())))
		}
	}
	return errors.Join(errs...)
}

// lockProfiles keeps other processes from changing the node's profiles.
func (n *Node) lockProfiles() (unlock func(), err error) {
	if err := os.MkdirAll(n.profiles(), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(n.profiles(), "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// Learn records a start of the image that ref names by a digest: what is read of the chain, which is in use ([Chain.Use]), from now
// until nothing is for a while, or until over is called and by all others who called Learn for the chain meanwhile. What comes of it is added to
// the node's profiles behind.
func (c Chain) Learn(ref remote.Reference, digest v1.Hash) (over func()) {
	layers, err := c.queued()
	if err != nil { // it is in use, so there is none
		return func() {}
	}
	return c.learn(ref, digest, layers, func(ctx context.Context) ([]string, error) {
		image, err := c.n.Image(ctx, ref, digest)
		if err != nil {
			return nil, err
		}
		config, _, err := image.Config(ctx)
		if err != nil {
			return nil, err
		}
		return commandOf(config), nil
	})
}

func (c Chain) learn(ref remote.Reference, digest v1.Hash, layers []*fetch.Layer, command func(context.Context) ([]string, error)) (over func()) {
	lazy := slices.ContainsFunc(c.Layers, func(r RecordLayer) bool { return r.Lazy })
	n, id := c.n, c.ID()
	x := &n.learning
	if n.o.Unlearned || !lazy {
		return func() {}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	s := x.starts[id]
	if s == nil {
		s = &start{recorder: n.queue.Record(layers...), over: make(chan struct{})}
		x.starts[id] = s
		x.work.Go(func() {
			s.wait(x.ctx)
			touches := s.recorder.Stop()
			x.mu.Lock()
			if x.starts[id] == s { // else another has begun
				delete(x.starts, id)
			}
			x.mu.Unlock()
			if len(touches) == 0 {
				return
			}
			n.rest(x.ctx)
			if x.ctx.Err() != nil {
				return
			}
			ctx, cancel := context.WithTimeout(x.ctx, configPatience)
			defer cancel()
			line, err := command(ctx)
			var lesson Lesson
			if err == nil {
				lesson, err = c.note(ref, digest, line, touches)
			}
			if err != nil {
				n.log.Info("what a start has read was not learned", "image", ref.String(), "err", err)
				return
			}
			n.log.Debug("learned from a start", "image", ref.String(), "touches", len(touches), "pieces", len(lesson.Learned.Profile.Pieces), "missed", lesson.Missed, "packed", lesson.Packed)
			if n.o.Learned != nil {
				n.o.Learned(x.ctx, lesson)
			}
		})
	}
	s.users++
	var once sync.Once
	return func() {
		once.Do(func() {
			x.mu.Lock()
			defer x.mu.Unlock()
			if s.users--; s.users == 0 {
				close(s.over)
				if x.starts[id] == s { // who comes now begins anew
					delete(x.starts, id)
				}
			}
		})
	}
}

// rest returns when nothing has been started for a while, or not for long: what was read is worked on for a third of a second of one processor, and
// who runs many short jobs has the next one waiting. A process that runs one image, and then ends, does not wait.
func (n *Node) rest(ctx context.Context) {
	if !n.daemon {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, learnPatience)
	defer cancel()
	select {
	case <-time.After(learnPause):
		n.queue.WaitIdle(ctx, learnPause)
	case <-ctx.Done():
	}
}

// wait returns when the start is over.
func (s *start) wait(ctx context.Context) {
	select {
	case <-s.recorder.Begun():
	case <-s.over:
		return
	case <-ctx.Done():
		return
	}
	end := time.Now().Add(learnAtMost)
	for {
		left := min(learnQuiet-s.recorder.Quiet(), time.Until(end))
		if left <= 0 {
			return
		}
		timer := time.NewTimer(left)
		select {
		case <-timer.C:
		case <-s.over:
			timer.Stop()
			return
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// queued returns the chain's layers as the queue has them. The chain is in use.
func (c Chain) queued() ([]*fetch.Layer, error) {
	var layers []*fetch.Layer
	for _, r := range c.Layers {
		_, key, err := c.n.openRecord(r)
		if err != nil {
			return nil, err
		}
		c.n.mu.Lock()
		if u := c.n.used[key]; u != nil {
			layers = append(layers, u.Layer)
		}
		c.n.mu.Unlock()
	}
	return layers, nil
}

// note adds a start to the profile of its repository and command.
func (c Chain) note(ref remote.Reference, digest v1.Hash, command []string, touches []fetch.Touch) (Lesson, error) {
	n := c.n
	lesson := Lesson{Reference: ref, Digest: digest, Chain: c}
	n.learning.one.Lock()
	defer n.learning.one.Unlock()
	unlock, err := n.lockProfiles()
	if err != nil {
		return lesson, err
	}
	defer unlock()
	path := profilePath(n.profiles(), repositoryOf(ref), command)
	l, err := readLearned(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			n.log.Warn("a profile cannot be used; it is made again", "err", err)
		}
		l = new(Learned)
	}
	n.learning.mu.Lock()
	known, packed := n.learning.packs[c.ID()]
	n.learning.mu.Unlock()
	old := l.Profile
	files, err := c.files(touches, known.chunks, old)
	if err != nil {
		return lesson, err
	}
	run := profile.FromTouches(profileTouches(touches), files.paths)
	if len(run.Pieces) == 0 {
		return lesson, errors.New("nothing of the image was read")
	}
	if packed {
		old = withPack(old, files.packProfile(known.chunks))
		lesson.Pack, lesson.Packed, lesson.Missed = known.digest, len(known.chunks), files.missed(run, known.chunks)
	}
	*l = Learned{
		Repository: repositoryOf(ref), Command: command, Image: digest.String(), Starts: l.Starts + 1, Updated: time.Now().UTC(),
		// What was here when it was opened was not seen. Nobody can have read what is not here even now.
		Profile: profile.Learn(old, run, func(x profile.Piece) bool {
			o, ok := files.objects[x.Path]
			return ok && n.store.Here(store.Key(o.key), o.size) > 0
		}).Bound(maxPieces),
	}
	lesson.Learned = *l
	if err := l.write(path); err != nil {
		return lesson, err
	}
	return lesson, boundProfiles(n.profiles(), maxProfiles, maxProfileBytes)
}

// withPack adds what a pack has and old lacks to old. A pack does not say when it is touched, but in which order.
func withPack(old, packed *profile.Profile) *profile.Profile {
	if old == nil {
		return packed
	}
	type id struct {
		path  string
		piece int
	}
	when := map[id]float64{}
	for _, x := range old.Pieces {
		when[id{x.Path, x.Index}] = x.MS
	}
	all := &profile.Profile{Pieces: slices.Clone(old.Pieces)}
	at := 0.0
	for _, x := range packed.Pieces {
		if ms, ok := when[id{x.Path, x.Index}]; ok {
			at = ms
			continue
		}
		x.MS = at
		all.Pieces = append(all.Pieces, x)
	}
	slices.SortStableFunc(all.Pieces, func(a, b profile.Piece) int { return cmp.Compare(a.MS, b.MS) })
	return all
}

// A chainFile is a regular file of a chain.
type chainFile struct {
	key    toc.Digest
	size   int64
	chunks []toc.Chunk
}

// chainFiles are some regular files of a chain.
type chainFiles struct {
	objects map[string]chainFile
	paths   map[toc.Digest]string // by object, the first one
}

// files returns the files whose objects were touched or are in a pack, and those that a profile, which may be nil, names. To make the whole tree of a
// large image would take a second; what that would show beyond this is that a file is hidden by a whiteout.
func (c Chain) files(touches []fetch.Touch, chunks []pack.Chunk, p *profile.Profile) (*chainFiles, error) {
	objects, named := map[uint64]bool{}, map[string]bool{}
	for _, t := range touches {
		objects[packNumber(toc.Digest(t.Key))] = true
	}
	for _, x := range chunks {
		objects[x.Object] = true
	}
	if p != nil {
		for _, x := range p.Pieces {
			named[x.Path] = true
		}
	}
	f := &chainFiles{map[string]chainFile{}, map[toc.Digest]string{}}
	var order []string
	for _, l := range c.parts() {
		t, err := l.load(c.n)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.id, err)
		}
		for i := range t.Entries {
			e := &t.Entries[i]
			if e.Type != toc.Regular || e.Size == 0 {
				continue
			}
			content := t.Content(e)
			key := toc.ObjectKey(content)
			if !objects[packNumber(key)] && !named[e.Name] {
				continue
			}
			named[e.Name] = true // a layer above may have another
			order = append(order, e.Name)
			f.objects[e.Name] = chainFile{key, e.Size, slices.Clone(content)} // not all of the table
		}
	}
	for _, name := range order {
		if o := f.objects[name]; f.paths[o.key] == "" {
			f.paths[o.key] = name
		}
	}
	return f, nil
}

func (f *chainFiles) content(path string) []toc.Chunk { return f.objects[path].chunks }

// packProfile is the profile that a pack may have been made of.
func (f *chainFiles) packProfile(chunks []pack.Chunk) *profile.Profile {
	byNumber := map[uint64]string{}
	for key, path := range f.paths {
		byNumber[packNumber(key)] = path
	}
	p := new(profile.Profile)
	for i, c := range chunks {
		o, ok := f.objects[byNumber[c.Object]]
		if !ok || c.Index >= len(o.chunks) {
			continue
		}
		x := o.chunks[c.Index]
		for piece := x.FileOffset / profile.PieceSize; piece <= (x.FileOffset+x.Size-1)/profile.PieceSize; piece++ {
			p.Pieces = append(p.Pieces, profile.Piece{Path: f.paths[o.key], Index: int(piece), Share: 1, MS: float64(i)})
		}
	}
	return p
}

// missed returns how many chunks a run wanted that are not in a pack.
func (f *chainFiles) missed(run *profile.Profile, chunks []pack.Chunk) int {
	has := map[pack.Chunk]bool{}
	for _, c := range chunks {
		has[c] = true
	}
	missed := 0
	for _, c := range run.Chunks(0, f.content) {
		if !has[pack.Chunk{Object: packNumber(c.Key), Index: c.Index}] {
			missed++
		}
	}
	return missed
}

// knowPack remembers what the pack of a chain has.
func (n *Node) knowPack(chain string, digest v1.Hash, chunks []pack.Chunk) {
	if n.o.Unlearned || len(chunks) > maxPieces {
		return
	}
	n.learning.mu.Lock()
	defer n.learning.mu.Unlock()
	for other := range n.learning.packs {
		if len(n.learning.packs) < maxKnownPacks {
			break
		}
		delete(n.learning.packs, other)
	}
	n.learning.packs[chain] = knownPack{digest, chunks}
}

// learned returns what the node knows of the starts of a repository's images that have a command, or nil.
func (n *Node) learned(repository string, command []string) *Learned {
	if n.o.Unlearned {
		return nil
	}
	l, err := readLearned(profilePath(n.profiles(), repository, command))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			n.log.Warn("a profile cannot be used", "err", err)
		}
		return nil
	}
	return l
}

// learnedOf is learned for an image whose config is not here: it is asked for if there is any profile of its repository.
func (n *Node) learnedOf(ctx context.Context, ref remote.Reference, image *remote.Image) *Learned {
	some, _ := filepath.Glob(filepath.Join(n.profiles(), repositoryPrefix(repositoryOf(ref))+"*.profile"))
	if n.o.Unlearned || len(some) == 0 {
		return nil
	}
	config, _, err := image.Config(ctx)
	if err != nil { // who runs it hears of it
		return nil
	}
	return n.learned(repositoryOf(ref), commandOf(config))
}

// contents returns what lies at the paths that are keys of files in an image whose tables of contents are given. A whiteout is not
// looked at: at worst something is fetched that nobody sees.
func contents[T any](files map[string]T, tocs []*toc.TOC) map[string][]toc.Chunk {
	content := map[string][]toc.Chunk{}
	for _, t := range tocs { // what is above, and what comes later, wins
		for i := range t.Entries {
			e := &t.Entries[i]
			if e.Type != toc.Regular {
				continue
			}
			if _, ok := files[e.Name]; ok {
				content[e.Name] = t.Content(e)
			}
		}
	}
	return content
}

// wants returns the chunks that a profile names by the paths.
func wants(p *profile.Profile, tocs []*toc.TOC) []fetch.Want {
	named := map[string]bool{}
	for _, x := range p.Pieces {
		named[x.Path] = true
	}
	content := contents(named, tocs)
	var list []fetch.Want
	for _, c := range p.Chunks(0, func(path string) []toc.Chunk { return content[path] }) {
		list = append(list, fetch.Want{Key: store.Key(c.Key), Chunk: c.Index})
	}
	return list
}

// changed returns what lies now where objects of a pack lay in the image that it was made of, if that is another content: the chunks with the
// same numbers.
func changed(x *pack.Index, tocs []*toc.TOC) []fetch.Want {
	paths := map[string]bool{}
	for _, path := range x.Paths {
		paths[path] = true
	}
	content := contents(paths, tocs)
	var list []fetch.Want
	for i := range x.Frames {
		for _, c := range x.Frames[i].Chunks {
			chunks := content[x.Paths[c.Object]]
			if c.Index >= len(chunks) {
				continue
			}
			if key := toc.ObjectKey(chunks); packNumber(key) != c.Object {
				list = append(list, fetch.Want{Key: store.Key(key), Chunk: c.Index})
			}
		}
	}
	return list
}

// Image begins to look for what the node has learned of starts like the image's.
func (s *Startup) Image(image *remote.Image) {
	s.own = make(chan *Learned, 1)
	s.work.Go(func() {
		defer close(s.own)
		if l := s.n.learnedOf(s.ctx, s.ref, image); l != nil {
			s.own <- l
		}
	})
}

// noteIndex notes what the pack has.
func (s *Startup) noteIndex(x *pack.Index) {
	for i := range x.Frames {
		s.chunks = append(s.chunks, x.Frames[i].Chunks...)
	}
	s.n.knowPack(s.chain, s.digest, s.chunks)
	s.once.Do(func() { close(s.indexed) })
}

// indexPatience is for how long what was learned waits to hear what the pack brings: some round trips of most links.
const indexPatience = 200 * time.Millisecond

// arrive puts the pack into the store, and beside it what was learned, which own brings, and the pack does not. A nil own is nothing. A start of which
// neither knows what it wants is followed. The error is of the pack.
func (s *Startup) arrive(own <-chan *Learned, layers []*fetch.Layer, tocs []*toc.TOC) error {
	var list []fetch.Want
	var work sync.WaitGroup
	work.Go(func() {
		var l *Learned
		if own != nil {
			l = <-own
		}
		if l == nil {
			if !s.covered() {
				s.follow(layers, tocs)
			}
			return
		}
		list = wants(l.Profile, tocs)
		rest := list
		select {
		case <-s.indexed:
			packed := map[pack.Chunk]bool{}
			for _, c := range s.chunks {
				c.Size = 0
				packed[c] = true
			}
			rest = slices.DeleteFunc(slices.Clone(list), func(w fetch.Want) bool {
				return packed[pack.Chunk{Object: packNumber(toc.Digest(w.Key)), Index: w.Chunk}]
			})
		case <-time.After(indexPatience):
		}
		s.ahead(rest, layers)
	})
	_, err := s.into(layers, tocs)
	s.once.Do(func() { close(s.indexed) })
	work.Wait()
	switch {
	case err == nil:
	case list != nil:
		s.ahead(list, layers)
	case s.covered(): // it was to be
		s.follow(layers, tocs)
	}
	if s.guess && errors.Is(err, fetch.ErrUseless) {
		err = nil // another command runs
	}
	return err
}

// ahead fetches what is wanted and not here. What cannot be had is for who reads it to hear of.
func (s *Startup) ahead(list []fetch.Want, layers []*fetch.Layer) {
	if len(list) == 0 || s.ctx.Err() != nil {
		return
	}
	begun := time.Now()
	stats, err := s.n.queue.Ahead(s.ctx, list, layers...)
	s.n.log.Debug("fetched ahead what a start wants", "image", s.ref.String(), "chunks", stats.Chunks, "here", stats.Here, "requests", stats.Runs, "bytes", stats.Bytes, "took", time.Since(begun), "err", err)
}

// packNumber is what a pack calls an object.
func packNumber(key toc.Digest) uint64 { return binary.BigEndian.Uint64(key[:]) }

// PackOf returns the digest of the newest startup pack of the manifest with a digest, in the repository that ref names, or the zero value if there is
// none.
func (n *Node) PackOf(ctx context.Context, ref remote.Reference, digest v1.Hash) (v1.Hash, error) {
	src, err := n.source(ref)
	if err != nil {
		return v1.Hash{}, err
	}
	list, err := remote.Referrers(ctx, src, digest, pack.MediaType)
	best, rank := newestPack(list)
	if rank == noPack {
		return v1.Hash{}, err
	}
	return best.Digest, nil
}

// KnowPack tells the node that the chain's pack is now the one that r has, whose digest is given.
func (n *Node) KnowPack(c Chain, digest v1.Hash, r io.Reader) error {
	x, err := pack.ReadIndex(r)
	if err != nil {
		return err
	}
	var chunks []pack.Chunk
	for i := range x.Frames {
		chunks = append(chunks, x.Frames[i].Chunks...)
	}
	n.knowPack(c.ID(), digest, chunks)
	return nil
}
