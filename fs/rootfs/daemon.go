package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
	"lazuli/fs/remote"
	"lazuli/fs/serve"
	"lazuli/fs/store"
)

// lingering is how long a daemon may have its root folder that is about to be gone.
const lingering = 3 * time.Second

// lockDaemon takes the lock of the one daemon that a root folder may have.
func lockDaemon(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, "daemon.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	// A process that was killed closes its files one after the other, and this one perhaps long after that by which its
	// successor knew that it is gone.
	for end := time.Now().Add(lingering); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(end) {
			f.Close()
			return nil, fmt.Errorf("%s: a daemon has this root folder already: stop it, or choose another with --root", root)
		}
	}
}

// Root is the node's root folder, without symbolic links.
func (n *Node) Root() string { return n.root }

func (n *Node) serverDir() string {
	if n.daemon {
		return filepath.Join(n.root, "server")
	}
	return filepath.Join(n.run, "objects")
}

// Serve begins to serve the mounts of a daemon's node. Before it is called, everything that is mounted must have been made
// readable ([Chain.Use], [Node.Adopt]). fd is the connection of a server that is gone and init what the kernel
// said first (see [serve.Resume]); a negative fd is none, and one that has died counts as none. The new connection, for
// whoever keeps it, is in the server that is returned; resumed says that it is the old one.
func (n *Node) Serve(fd int, init []byte) (s *serve.Server, resumed bool, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	dir := n.serverDir()
	if fd >= 0 {
		if n.server, err = serve.Resume(fd, init, n.queue, n.log); err == nil {
			return n.server, true, nil
		}
		n.log.Warn("the connection of the last server cannot be used; what is mounted keeps what is here, and gets errors for the rest until it is mounted again", "err", err)
		unix.Close(fd)
	}
	// What a dead server left there is of no use to anybody new.
	for unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, false, err
	}
	n.server, err = serve.Mount(dir, n.queue, n.log)
	return n.server, false, err
}

// ServerDevice is the device number of the object server's mount, by which a mount that was made on an earlier one is known.
func (n *Node) ServerDevice() (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat(n.serverDir(), &st)
	return st.Dev, err
}

// Adopt goes on with what the daemon before this one had mounted by [Node.Mount], and removes what is not mounted any more.
func (n *Node) Adopt() ([]*Rootfs, error) {
	dirs, err := filepath.Glob(filepath.Join(n.run, "*"))
	if err != nil {
		return nil, err
	}
	var all []*Rootfs
	for _, dir := range dirs {
		r, err := n.adopt(dir)
		if err != nil {
			n.log.Info("removing what a daemon left", "dir", dir, "why", err)
			if err := removeRun(dir); err != nil {
				n.log.Warn("cannot remove what a daemon left", "dir", dir, "err", err)
			}
			continue
		}
		all = append(all, r)
	}
	return all, nil
}

func (n *Node) adopt(dir string) (*Rootfs, error) {
	records, err := readRecords(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	if len(records) != 1 || records[0].Dir == "" {
		return nil, errors.New("it was not finished")
	}
	r := &Rootfs{n: n, dir: dir, Dir: records[0].Dir, record: records[0]}
	if mounted, err := isMounted(r.Dir); err != nil || !mounted {
		return nil, errors.Join(err, errors.New("it is not mounted any more"))
	}
	ref, err := remote.ParseReference(r.record.Reference)
	if err != nil {
		return nil, err
	}
	if r.src, err = n.source(ref); err != nil {
		return nil, err
	}
	r.shared = true
	r.release, err = n.Chain(r.record.Layers).Use()
	return r, err
}

// Reference is what the user called the image.
func (r *Rootfs) Reference() string { return r.record.Reference }

// Folder is where the rootfs has what it needs, below the node's root folder.
func (r *Rootfs) Folder() string { return r.dir }

// Mounted reports whether a rootfs of this package is mounted at dir, which has no symbolic links.
func Mounted(dir string) (bool, error) { return isMounted(dir) }

// Detach unmounts what is mounted at dir, if anything is; programs that use it keep it until they are done.
func Detach(dir string) error { return unmount(dir) }

// Sweep unmounts metadata images that no record of a mount names, and removes those from the store, and those of gone, that no image
// needs either. gone are chains whose records have been removed.
func (n *Node) Sweep(gone ...string) error {
	n.sweeping.Lock() // else a chain could go away between its mount and the one that is stacked on it
	defer n.sweeping.Unlock()
	used, err := n.inUse()
	if err != nil {
		return err
	}
	images, err := readRecords(filepath.Join(n.root, "images", "*.json"))
	if err != nil {
		return err
	}
	keep, kept := map[string]bool{}, map[string]bool{}
	for _, r := range used {
		if r.Reference == "" || r.Dir != "" { // it is mounted
			keep[r.Chain] = true
		}
		kept[r.Chain] = true
	}
	for _, r := range images {
		kept[r.Chain] = true
	}
	entries, err := os.ReadDir(filepath.Join(n.root, "chains"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	for _, e := range entries {
		if keep[e.Name()] {
			continue
		}
		dir := filepath.Join(n.root, "chains", e.Name())
		err := unmount(dir)
		if err == nil {
			err = os.Remove(dir)
		}
		if err == nil && !kept[e.Name()] {
			err = os.RemoveAll(n.store.Path("meta", e.Name()+".erofs"))
		}
		errs = append(errs, err)
	}
	for _, chain := range gone {
		if !kept[chain] && chain != "" {
			errs = append(errs, os.RemoveAll(n.store.Path("meta", chain+".erofs")))
		}
	}
	return errors.Join(errs...)
}

// Teardown unmounts everything below root, whoever mounted it, last mounted first, and rootfs that were mounted elsewhere by a
// daemon. Programs that use it keep what they have open. It returns how many mounts there were.
func Teardown(root string) (int, error) {
	root, err := realPath(root)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	lock, err := lockDaemon(root)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	elsewhere := map[string]bool{}
	records, err := readRecords(filepath.Join(root, "mounts", "*", "*.json"))
	if err != nil {
		return 0, err
	}
	for _, r := range records {
		elsewhere[r.Dir] = true
	}
	points, err := mountPoints()
	if err != nil {
		return 0, err
	}
	n := 0
	var errs []error
	for i := len(points) - 1; i >= 0; i-- {
		p := points[i]
		ours := strings.HasPrefix(p.dir, root+"/") && !strings.HasPrefix(p.dir, filepath.Join(root, "run")+"/") ||
			elsewhere[p.dir] && p.source == mountSource
		if !ours {
			continue
		}
		n++
		if err := unmount(p.dir); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p.dir, err))
		}
	}
	errs = append(errs, os.RemoveAll(filepath.Join(root, "mounts")))
	return n, errors.Join(errs...)
}

// InUse reports whether anything is mounted that uses the object server of the daemon with this root.
func InUse(root string) bool {
	points, err := mountPoints()
	if err != nil {
		return true
	}
	for _, p := range points {
		if p.fstype == "overlay" && p.source == mountSource && strings.Contains(p.options, escape(filepath.Join(root, "server"))) {
			return true
		}
	}
	return false
}

// QueueStats says what the node's fetcher did.
func (n *Node) QueueStats() fetch.Stats { return n.queue.Stats() }

// Waits says how long reads waited for the network.
func (n *Node) Waits() fetch.Waits { return n.queue.Waits() }

// Under returns what is being fetched.
func (n *Node) Under() []fetch.Under { return n.queue.Under() }

// Size is how much of the disk the store's objects take, in bytes.
func (n *Node) Size() (int64, error) { return n.store.Size() }

// Hold keeps what is in the store from being pruned until the returned function is called: for who adds to it what no
// record names yet.
func (n *Node) Hold() (release func(), err error) { return n.holdImages(unix.LOCK_SH) }

// Store is the node's store, for who puts files into it.
func (n *Node) Store() *store.Store { return n.store }
